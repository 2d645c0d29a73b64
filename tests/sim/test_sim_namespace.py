"""Files in the simulated cluster: seeds with metadata servers and clients that work on files, and planted bugs found.

More: `emberline sim`, of which every second seed has files.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest.mock import patch

import pytest
from emberfs.errors import EmberError
from emberfs.kv.types import Transaction
from emberfs.meta import recovery, session
from emberfs.meta import truncate as meta_truncate
from emberfs.meta.clients import Clients
from emberfs.meta.keys import intent_key
from emberfs.meta.state import MetaState
from emberfs.storage.repair import Repairer
from emberfs.testing.sim.model import ModelFile, Tree, differences
from emberfs.testing.sim.simulation import OPERATIONS_MIN, VIRTUAL_S_MIN, config_of, simulate
from emberfs.types import CHUNK_SIZE_BYTES_MIN

Patch = AbstractContextManager[Any]


def test_files_are_what_the_model_says_and_fsck_is_silent() -> None:
    for seed in (0, 2):
        assert config_of(seed).tenants
        report = simulate(seed)
        assert report.operations >= OPERATIONS_MIN
        assert report.virtual_s >= VIRTUAL_S_MIN


def test_a_seed_with_files_replays_to_the_same_trace() -> None:
    assert simulate(4).trace_hash == simulate(4).trace_hash


# ---- planted bugs


def _forgets_results() -> Patch:
    """A retry is served as if it were the first attempt."""

    async def none(self: Clients, txn: Transaction, name: Any) -> None:
        return None

    return patch.object(Clients, "_stored", none)


def _closes_the_files_of_the_living() -> Patch:
    """When one client has ended, the files of all are recovered."""
    recover = recovery._recover_sessions

    class Everybody(set[bytes]):
        def __contains__(self, client: object) -> bool:
            return True

    async def all_of_them(state: MetaState, ended: set[bytes]) -> set[bytes]:
        return set(await recover(state, Everybody(ended)))

    return patch.object(recovery, "_recover_sessions", all_of_them)


def _forgets_truncates() -> Patch:
    """The row says that chunks are to be cut, and goes without it."""

    async def forget(state: MetaState, inode: int) -> None:
        async def work(txn: Transaction) -> None:
            txn.delete(intent_key(inode))

        await state.kv.run(work, reclaims=True)

    stack = ExitStack()
    for module in (meta_truncate, session, recovery):
        stack.enter_context(patch.object(module, "finish", forget))
    return stack


def _leaves_chunks_without_a_name() -> Patch:
    async def nothing(state: MetaState, begin: int, end: int) -> int:
        return 0

    return patch.object(recovery, "_sweep_range", nothing)


def _repairs_nothing() -> Patch:
    async def no(self: Repairer, *_: Any) -> bool:
        return False

    return patch.object(Repairer, "repair", no)


BUGS: dict[str, tuple[Callable[[], Patch], int, int]] = {
    "serves a retry as a first attempt": (_forgets_results, 2, 20),
    "closes the files of the living": (_closes_the_files_of_the_living, 12, 40),
    "forgets truncates": (_forgets_truncates, 4, 20),
    "leaves chunks without a name": (_leaves_chunks_without_a_name, 0, 20),
    "repairs no damage": (_repairs_nothing, 40, 40),
}
"""What is wrong -> (how to plant it, a seed with files that found it when this was written, within how many such seeds
from there it is found)."""


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str) -> None:
    plant, first, seeds_max = BUGS[bug]
    with plant(), pytest.raises(Exception) as caught:
        for seed in range(first, first + 2 * seeds_max, 2):
            simulate(seed)
    assert "seed" in "".join(caught.value.__notes__)


# ---- the model itself


def test_a_write_in_doubt_may_be_there_in_part() -> None:
    file = ModelFile(b"old")
    file.maybe(CHUNK_SIZE_BYTES_MIN - 2, b"abcd")
    gap = bytes(CHUNK_SIZE_BYTES_MIN - 5)
    for content in (b"old", b"old" + gap + b"ab", b"old" + gap + b"abcd", b"old" + gap + b"\0\0cd"):
        assert file.allows(content)
    for content in (b"odd", b"old" + gap, b"old" + gap + b"abcx", b"old" + gap + b"abcd."):
        assert not file.allows(content)


def test_a_tree_says_what_is_not_as_it_should_be() -> None:
    tree = Tree()
    tree.mkdir("d")
    tree.put("d/a", b"content")
    tree.link("d/a", "b")
    assert not differences(tree, {"d": None, "d/a": b"content", "b": b"content"})
    assert differences(tree, {"d": None, "d/a": b"content"}) == ["b is missing"]
    assert len(differences(tree, {"d": None, "d/a": b"contend", "b": b"content", "c": b""})) == 2
    with pytest.raises(EmberError):
        tree.rename("d", "d/e", overwrite=True)
