"""Cross-entropy of rows against a head, in fp32, without all logits at once.

Where logits of all rows are large, rows are taken some at a time, and their logits computed again for the gradient: a
vocabulary of 129,280 costs 2 MB a token in logits and gradients otherwise.

N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .packing import NONE

LOGITS_MAX = 1 << 25
"""Logits alive at once: 128 MiB in fp32, and as much for their gradient."""


def cross_entropy(
    head: Callable[[Tensor], Tensor], rows: Tensor, targets_N: Tensor, vocab_size: int, *, most: int = LOGITS_MAX
) -> Tensor:
    """The sum over rows that have a target; `head` gives logits [n, V] of some of the `rows` [N, ...]."""
    count = max(1, most // vocab_size)
    if len(rows) <= count:
        return _summed(head, rows, targets_N)
    parts = zip(rows.split(count), targets_N.split(count), strict=True)
    sums = [
        checkpoint(_summed, head, some, targets, use_reentrant=False, preserve_rng_state=False)
        for some, targets in parts
    ]
    return torch.stack(sums).sum()


def _summed(head: Callable[[Tensor], Tensor], rows: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(head(rows).float(), targets_N, ignore_index=NONE, reduction="sum")
