"""Packed samples against a reading of them token by token, and losses that do not depend on how rows are cut."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from embertrain.train.losses import cross_entropy
from embertrain.train.packing import pack
from hypothesis import given
from hypothesis import strategies as st

EOS = 9


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """A stream of documents, and the samples to cut it into."""
    documents = draw(st.lists(st.lists(st.integers(0, EOS - 1), max_size=7), min_size=1, max_size=12))
    stream = [token for document in documents for token in [*document, EOS]]
    S = draw(st.integers(2, 9))
    stream += [0] * max(0, S + 1 - len(stream))
    return stream, S, (len(stream) - 1) // S


@given(streams(), st.integers(0, 2))
def test_targets_and_documents_are_those_of_the_stream(drawn: tuple[list[int], int, int], depths: int) -> None:
    stream, S, count = drawn
    document = np.cumsum([0, *(token == EOS for token in stream[:-1])]).tolist()
    tokens = np.array([stream[i * S : i * S + S + 1] for i in range(count)], np.uint32)
    starts = [
        np.array([0, *(p for p in range(1, S) if document[i * S + p] != document[i * S + p - 1])], np.int64)
        for i in range(count)
    ]
    packed = pack(tokens, starts, eos_id=EOS, depths=depths)
    assert packed.ids_T.tolist() == stream[: count * S] and packed.tokens == count * S
    positions, segments = packed.batch.positions_T.tolist(), packed.batch.segment_T.tolist()
    for t in range(count * S):
        sample, place = divmod(t, S)
        begin = max([p for p in starts[sample].tolist() if p <= place])
        assert positions[t] == place - begin
        assert (segments[t] == segments[t - 1]) == (place > begin) or t == 0
        for depth in range(depths + 1):
            ahead = t + depth + 1
            # One token beyond the sample is known, and no more.
            known = place + depth + 1 <= S and document[ahead] == document[t]
            assert packed.targets[depth][t] == (stream[ahead] if known else -100)
            if depth > 0 and known:
                assert packed.next_ids[depth - 1][t] == stream[ahead - 1]
    assert packed.counts == tuple(int((rows != -100).sum()) for rows in packed.targets)


def test_rows_may_be_taken_some_at_a_time() -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 8, generator=g, requires_grad=True)
    weight = torch.randn(30, 8, generator=g, requires_grad=True)
    targets = torch.randint(0, 30, (50,), generator=g)
    targets[::7] = -100
    whole = F.cross_entropy(rows @ weight.T, targets, ignore_index=-100, reduction="sum")
    expected = torch.autograd.grad(whole, [rows, weight])
    alive: list[int] = []

    def head(some: torch.Tensor) -> torch.Tensor:
        alive.append(len(some))
        return some @ weight.T

    parts = cross_entropy(head, rows, targets, 30, most=30 * 12)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, [rows, weight]), expected)
    assert max(alive) == 12 and len(alive) > 5
