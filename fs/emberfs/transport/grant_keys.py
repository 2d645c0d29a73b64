"""The keys that grants are made and checked with, in a file of the machine's.

Does not know: grants.
"""

from __future__ import annotations

import logging
from pathlib import Path

from ..errors import InvalidPath
from ..grants import KEY_BYTES, KEYS_MAX

log = logging.getLogger("emberline.transport")


class GrantKeys:
    """The keys of a file, 64 hexadecimal digits a line: the first one signs, all are accepted.

    To change the key, put the new one behind the old one everywhere, then before it, then take the old one out once the
    longest lease is over.
    """

    def __init__(self, path: Path) -> None:
        """Raises InvalidPath."""
        self._path = path
        self._seen = _version(path)
        self.keys = read_keys(path)

    def look(self) -> bool:
        """Read the file again if it was changed. True: there are other keys now. One that is no good is left alone."""
        try:
            seen = _version(self._path)
            if seen == self._seen:
                return False
            self._seen = seen
            keys = read_keys(self._path)
        except InvalidPath as error:
            log.warning("the keys of grants stay as they are: %s", error)
            return False
        changed, self.keys = keys != self.keys, keys
        return changed


def read_keys(path: Path) -> tuple[bytes, ...]:
    """Raises InvalidPath for what is no file of keys."""
    try:
        lines = path.read_text().split()
        keys = tuple(bytes.fromhex(line) for line in lines)
    except (OSError, ValueError) as error:
        raise InvalidPath(f"{path} is no file of keys for grants: {error}") from error
    if not 1 <= len(keys) <= KEYS_MAX or any(len(key) != KEY_BYTES for key in keys):
        raise InvalidPath(f"{path} needs 1 to {KEYS_MAX} lines of {2 * KEY_BYTES} hexadecimal digits")
    return keys


def _version(path: Path) -> tuple[int, int, int]:
    """Raises InvalidPath."""
    try:
        status = path.stat()
    except OSError as error:
        raise InvalidPath(f"{path} is no file of keys for grants: {error}") from error
    return status.st_ino, status.st_mtime_ns, status.st_size
