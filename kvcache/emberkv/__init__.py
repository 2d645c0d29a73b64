"""Prefix-keyed KV pages on the store, for inference nodes. No public API yet."""
