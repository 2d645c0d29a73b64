"""Which of the pages that are put are worth their write: all of them, or those that are put for the second time.

    write-through   each page is stored when it is put
    second-use      at its second put: a prompt that nobody sends again costs no disk, and the second one computes again
    on-evict        each is stored; but engines put what they are about to forget, and forget the end of a prompt before
                    its beginning: a page waits for the one before it as long as pages stay

What was put is remembered by a mark in a table of fixed size, where a younger key may take an older one's place. Only
puts count, not look-ups: a request looks up what it then puts, some engines several times. A page that continues
another was never put without it, so what comes before a page that is wanted is wanted too, whatever was forgotten.

Does not know: pages, or who puts them.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

WRITE_THROUGH, SECOND_USE, ON_EVICT = PUT_POLICIES = ("write-through", "second-use", "on-evict")

MARKS = 1 << 20
"""8 MiB: of a million pages it is remembered that they were put once."""


class Sightings:
    """Keys that were put once."""

    def __init__(self) -> None:
        self._marks = array("Q")

    def wanted(
        self, kind: int, keys: Sequence[bytes], parents: Sequence[bytes], is_there: Callable[[bytes], bool]
    ) -> list[bool]:
        """Of each page whether it is to be stored; `is_there`: a page of it is stored already, of whatever kind."""
        found = [is_there(key) or self._is_second(kind, key) for key in keys]
        for index in range(len(keys) - 1, 0, -1):
            if found[index] and parents[index] == keys[index - 1]:
                found[index - 1] = True
        return found

    def _is_second(self, kind: int, key: bytes) -> bool:
        if not self._marks:
            self._marks = array("Q", bytes(8 * MARKS))  # Not before somebody needs it.
        slot, mark = (int.from_bytes(key[:4]) + kind) % MARKS, int.from_bytes(key[4:12])
        is_same, self._marks[slot] = self._marks[slot] == mark, mark
        return is_same
