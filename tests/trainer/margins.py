"""How close a choice was: where what a top-k takes and what it leaves are nearly equal, rounding decides, and two right
programs say something else."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

MARGIN = 5e-6
"""Below it a choice is a toss-up."""


class Margins(TorchDispatchMode):
    """The least difference between what a top-k takes and what it leaves, over all of a forward call."""

    def __init__(self) -> None:
        super().__init__()
        self.least = float("inf")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.topk.default:
            scores, k = args[0], args[1]
            if k < scores.shape[-1]:
                best = scores.topk(k + 1, dim=-1).values[..., -2:]
                gaps = (best[..., 0] - best[..., 1])[(best > -1e30).all(-1)]  # what a mask left
                if gaps.numel():
                    self.least = min(self.least, float(gaps.min()))
        return func(*args, **(kwargs or {}))
