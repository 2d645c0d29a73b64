"""Samples of token shards as the model takes them: packed tokens, and what follows each.

A document of a sample is a segment whose positions begin at 0, also the first, which may have begun before the sample:
no token sees another document. The token after a document's last one belongs to another, and is nobody's target.

    targets[0] of token t is token t + 1, and targets[d + 1] is token t + d + 2, what MTP layer d is to say; -100 where
    that is of another document, or of the next sample.

B samples of S tokens and one that follows, T = B * S, D MTP layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..model.batch import Batch

NONE = -100
"""The target of a token that has none."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A forward call's tokens."""

    ids_T: Tensor
    """int64."""
    targets: tuple[Tensor, ...]
    """D + 1 of int64 [T]: of the model itself, then of each MTP layer."""
    next_ids: tuple[Tensor, ...]
    """D of int64 [T]: the tokens that MTP layer d is told. Of another document where there is no target anyway."""
    batch: Batch
    """Asks for no logits: the loss takes them some at a time."""
    counts: tuple[int, ...]
    """D + 1: tokens with a target."""

    @property
    def tokens(self) -> int:
        """T."""
        return self.batch.count


def pack(
    tokens_BS: NDArray[np.uint32],
    starts: Sequence[NDArray[np.int64]],
    *,
    eos_id: int,
    depths: int = 0,
    device: torch.device | str = "cpu",
) -> Packed:
    """`tokens_BS` [B, S + 1], and for each sample where its documents begin, 0 first. `depths` is D."""
    B, S = tokens_BS.shape[0], tokens_BS.shape[1] - 1
    assert len(starts) == B and all(at[0] == 0 and at[-1] < S for at in starts)
    tokens = tokens_BS.astype(np.int64)
    ids, following = tokens[:, :-1], tokens[:, 1:]
    # Positions whose next token is of another document.
    last = np.zeros((B, S), dtype=bool)
    for sample, at in enumerate(starts):
        last[sample, at[1:] - 1] = True
    last[:, -1] = ids[:, -1] == eos_id
    targets = [np.where(last, NONE, following)]
    next_ids = [following]
    last[:, -1] = True  # What comes after the sample is not known.
    for _ in range(depths):
        targets.append(np.where(last, NONE, np.roll(targets[-1], -1, axis=1)))
        next_ids.append(np.where(last, next_ids[-1], np.roll(next_ids[-1], -1, axis=1)))
    runs = [(0, int(n)) for at in starts for n in np.diff(at, append=S)]

    def on_device(rows: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows).reshape(-1)).to(device)

    return Packed(
        ids_T=on_device(ids),
        targets=tuple(map(on_device, targets)),
        next_ids=tuple(map(on_device, next_ids[:depths])),
        batch=Batch.of(runs, logits=(), device=device),
        counts=tuple(int((rows != NONE).sum()) for rows in targets),
    )
