"""Paths inside a store: absolute, "/"-separated, normalised before they leave the client."""

from __future__ import annotations

from functools import lru_cache

from ..errors import InvalidPath
from ..types import NAME_BYTES_MAX, PATH_BYTES_MAX


@lru_cache(maxsize=8192)
def normalise(path: str) -> str:
    """An absolute path without doubled slashes, "." or "..": "a//b/./c/.." is "/a/b". Raises InvalidPath.

    ".." is resolved by name, before symlinks are, and stops at the root (as a web server does, not as POSIX does).
    """
    if "\0" in path:
        raise InvalidPath(f"a path holds no NUL byte: {path!r}")
    names: list[str] = []
    for name in path.split("/"):
        if name == "..":
            if names:
                names.pop()
        elif name and name != ".":
            try:
                encoded = name.encode()
            except UnicodeEncodeError as error:
                raise InvalidPath(f"a path must be valid unicode: {path!r}") from error
            if len(encoded) > NAME_BYTES_MAX:
                raise InvalidPath(f"a name is at most {NAME_BYTES_MAX} bytes: {name[:40]!r}… has {len(encoded)}")
            names.append(name)
    normal = "/" + "/".join(names)
    if len(normal.encode()) > PATH_BYTES_MAX:
        raise InvalidPath(f"a path is at most {PATH_BYTES_MAX} bytes")
    return normal
