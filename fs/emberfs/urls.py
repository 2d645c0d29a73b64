"""`ember://` URLs: which store, and which path in it.

    ember:///data/store/!/corpus/a.parquet    store /data/store, path /corpus/a.parquet: the explicit form
    ember:///data/store/corpus/a.parquet      the same, if /data/store is a store already
    ember://./new                             a relative path with no store on the way: a store to be made there
    ember:///corpus/a.parquet                 no store on the way: path /corpus/a.parquet of the store given
    ember://corpus/a.parquet                  the same
    ember://db1:7301,db2:7301/corpus/a.parquet   a cluster, by the addresses of its managers, and a path in it

"The store given" is a file system's own (`url=`), else EMBERLINE_URL. Programs that put "ember://" before a name they
listed (Hugging Face datasets does) make the third form.

Does not know: whether the path exists.
"""

from __future__ import annotations

import os
import re

SCHEME = "ember://"
SUPERBLOCK = "superblock.json"


def split_url(url: str) -> tuple[str | None, str]:
    """(store URL or None for the store given, path in the store). A string without the scheme is a path."""
    if not url.startswith(SCHEME):
        return None, url
    rest = url[len(SCHEME) :]
    if cluster_addresses(url):
        hosts, _, path = rest.partition("/")
        return SCHEME + hosts, "/" + (path[1:] if path.startswith("!/") or path == "!" else path).lstrip("/")
    if not rest.startswith(("/", "./", "../", "~")):
        return None, "/" + rest
    directory, mark, inner = rest.partition("/!")
    if mark and (not inner or inner.startswith("/")):
        return SCHEME + directory, inner or "/"
    store = _store_above(rest)
    if store is None and not rest.startswith("/"):
        return url, "/"
    return (None, rest) if store is None else (SCHEME + store, rest[len(store) :] or "/")


_ADDRESSES = re.compile(r"ember://((?:[^/,:]+|\[[0-9a-fA-F:.]+\]):\d+(?:,(?:[^/,:]+|\[[0-9a-fA-F:.]+\]):\d+)*)(?:/|$)")


def cluster_addresses(url: str) -> list[str]:
    """The managers that the URL of a cluster names; empty for any other URL."""
    match = _ADDRESSES.match(url)
    return match[1].split(",") if match else []


_known_stores: set[str] = set()
"""Directories that were seen to be stores, so that a URL costs no file system call the second time."""


def _store_above(path: str) -> str | None:
    """The nearest directory at or above `path` that is a store."""
    candidate = path.rstrip("/")
    while candidate:
        if candidate in _known_stores:
            return candidate
        if os.path.exists(os.path.join(os.path.expanduser(candidate), SUPERBLOCK)):
            _known_stores.add(candidate)
            return candidate
        candidate = candidate.rpartition("/")[0]
    return None
