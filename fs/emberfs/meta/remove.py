"""Remove: a file, an empty directory or a tree, to the trash or for good.

Invariants: whatever goes is gone at once, in one transaction. A tree that is removed for good is detached first: its
top becomes an entry of the orphans directory, and `orphans` deletes it from there in bounded steps.
Does not know: how long the trash keeps things.
"""

from __future__ import annotations

from ..errors import DirectoryNotEmpty, InvalidPath, IsADirectory, NotADirectory
from ..kv.types import Transaction
from ..messages import Remove, Removed
from . import nodes
from .orphans import detach, start_sweeper
from .paths import Place, locate_existing
from .state import MetaState
from .trash import throw_away


async def remove(state: MetaState, request: Remove) -> Removed:
    """Remove what is at a path; a link itself, not what it points to."""

    async def work(txn: Transaction) -> tuple[str, bool]:
        place = await locate_existing(txn, request.path, follow=False)
        _check_kind(place, request)
        has_entries = place.is_dir and not await nodes.is_empty(txn, place.inode)
        if has_entries and not request.recursive:
            raise DirectoryNotEmpty("the directory is not empty", request.path)
        if request.trash:
            return await throw_away(state, txn, place, request.path), False
        if has_entries:
            await detach(state, txn, place)
        else:
            await nodes.remove(state, txn, place)
        return "", has_entries

    trash_id, is_detached = await state.decide(work, tuple[str, bool], reclaims=True)
    if is_detached:
        start_sweeper(state)
    return Removed(trash_id=trash_id)


def _check_kind(place: Place, request: Remove) -> None:
    """Raises if what is there is not what the caller wants to remove."""
    if not place.parent:
        raise InvalidPath("the root directory cannot be removed")
    if request.want == "file" and place.is_dir:
        raise IsADirectory("a directory, not a file", request.path)
    if request.want == "directory" and not place.is_dir:
        raise NotADirectory("not a directory", request.path)
