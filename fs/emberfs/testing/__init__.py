"""Suites that an engine or service of your own can be held against. Needs pytest."""
