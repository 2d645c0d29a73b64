"""Benchmarks: ours and its peers in one run, on the same data. See README.md; run `python -m benchmarks --help`."""
