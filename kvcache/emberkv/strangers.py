"""Files of segments that the index does not name: an earlier owner's, that it made and did not come to write down.

Does not know: what is in them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Sequence

from emberfs.errors import EmberError

from .files import Files
from .index import Index

log = logging.getLogger("emberline.kv")

STUCK_S = 60.0
"""A file that could not be removed is tried again after so long; others go meanwhile."""
_NAME = re.compile("[0-9a-f]{8}")
"""Of a segment's file. What else lies there is not ours."""


class Strangers:
    """Those of one namespace, found when it was opened (`names`) and by `look`."""

    def __init__(
        self, files: Files, directory: str, index: Index, names: Sequence[str], *, stay_s: float,
        stamp_s: Callable[[], float],
    ) -> None:  # fmt: skip
        """`stay_s`: who made them may have let others write to them; so long they stay."""
        self._files, self._directory, self._index = files, directory, index
        self._names, self._stay_s, self._stamp_s = list(names), stay_s, stamp_s
        self._until_s = stamp_s() + stay_s
        """None is removed before."""

    def __len__(self) -> int:
        return len(self._names)

    async def look(self, check: Callable[[], Awaitable[None]]) -> None:
        """Once more: an owner that was over and did not know it may have made files since. `check` raises if we are."""
        found = await find_strangers(self._files, self._directory, self._index)
        # Had somebody taken over before we looked, files of theirs would be among them.
        await check()
        if new := [name for name in found if name not in self._names]:
            self._names += new
            self._until_s = self._stamp_s() + self._stay_s

    async def remove_one(self, check: Callable[[], Awaitable[None]]) -> bool:
        """Remove a file that the index did not name when it was looked at. False: there is none that goes now. `check`
        raises if we are over: the next one may have given one of those names to a segment."""
        if not self._names or self._stamp_s() < self._until_s:
            return False
        await check()
        name = self._names.pop()
        try:
            await self._files.remove(f"{self._directory}/{name}")
        except (EmberError, OSError) as error:
            log.warning("%s/%s stays for now: %s", self._directory, name, error)
            self._names.insert(0, name)
            self._until_s = self._stamp_s() + STUCK_S
            return False
        return True


async def find_strangers(files: Files, directory: str, index: Index, *, is_opening: bool = False) -> list[str]:
    """Names of files of segments that an index does not name; their numbers are not used again. `is_opening`: what is
    retired and has no file is forgotten, since nobody writes down that it went."""
    names = [name for name in await files.names(directory) if _NAME.fullmatch(name)]
    segments, there = index.segments, {int(name, 16) for name in names}
    for segment in segments.retired() if is_opening else ():
        if segment.id not in there:
            segments.drop(segment)
    segments.next_id = max([segments.next_id, *(number + 1 for number in there)])
    return [name for name in names if int(name, 16) not in segments.by_id]
