"""The commands of the store: `emberline fs …`, `emberline bench` and `emberline doctor`. One noun per module.

Nothing here is part of the library's API: a command parses, calls the API, prints. Commands are loaded on first use.
"""
