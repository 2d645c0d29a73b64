"""V4's compressor: the tokens of a window become one entry, by a softmax of learned gates for every channel.

    entry_i = RMSNorm( sum over slots j of softmax_j(gate_j + ape_j) * value_j ),  rotated at the window's first token

Windows of 128 tokens stand alone (HCA). Windows of 4 overlap (CSA): every token has two series of values and gates, and
entry w pools the first series of window w - 1 with the second of window w, eight slots; window 0 has no such first
half. An entry exists once its window is closed (arXiv 2606.19348 sections 2.3.1 and 2.3.2).

Until then a token's values and gates wait, in fp32, as rows of the kind `state`.

n windows, r ratio, W width of a token's values (D, or 2 D where windows overlap), D width of an entry.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..cache.step import Rows, Step
from .attend import gather
from .batch import Segment
from .config import Rope
from .linear import Linear
from .norm import RMSNorm
from .rope import Angles, rotate


class Compressor(nn.Module):
    """Keeps rows of `kind` and of `state_kind`."""

    def __init__(
        self, hidden_size: int, dim: int, ratio: int, *, rope: Rope, eps: float, kind: str, state_kind: str
    ) -> None:
        super().__init__()
        self.ratio, self.dim, self.rope = ratio, dim, rope
        self.overlaps = ratio == 4
        self.kind, self.state_kind = kind, state_kind
        self.width = (2 if self.overlaps else 1) * dim
        self.wkv = Linear(hidden_size, self.width)
        self.wgate = Linear(hidden_size, self.width)
        self.ape = nn.Parameter(torch.zeros(ratio, self.width, dtype=torch.float32))
        self.norm = RMSNorm(dim, eps)

    def state(self, x_TH: Tensor) -> Tensor:
        """Values and gates of tokens: [T, 2 W] fp32."""
        return torch.cat([self.wkv(x_TH), self.wgate(x_TH)], -1).float()

    def append(self, rows: Rows, layer: int, segment: Segment, state: Tensor, angles: Angles) -> Tensor:
        """The entries of all windows closed so far, [N, D], after a segment of one sequence.

        `state` is that of the segment's tokens.
        """
        r, dtype = self.ratio, self.wkv.weight.dtype
        first, last = segment.first // r, segment.end // r
        begin = max(0, first - 1 if self.overlaps else first)
        held = rows.append(layer, self.state_kind, segment, segment.first, state, begin * r)
        if last == first:
            return rows.append(layer, self.kind, segment, first, state.new_zeros(0, self.dim).to(dtype), 0)
        windows = held[: (last - begin) * r].unflatten(0, (-1, r))
        if self.overlaps:
            has_before = torch.arange(first, last, device=state.device) > 0
            before = windows[:-1] if begin < first else torch.cat([windows[:1], windows[:-1]])
            fresh = self.pool(windows[first - begin :], before, has_before)
        else:
            fresh = self.pool(windows, None, None)
        fresh = rotate(fresh.to(dtype), angles.entries(self.rope, first, last - first, r))
        return rows.append(layer, self.kind, segment, first, fresh, 0)

    def step(self, step: Step, layer: int, run: tuple[Segment, ...], state: Tensor, angles: Angles) -> None:
        """The same for one token of each of several sequences; entries are written, and read by the caller."""
        r = self.ratio
        step.write(layer, self.state_kind, run, tuple(s.first for s in run), state)
        closing = tuple(i for i, s in enumerate(run) if s.end % r == 0)
        if not closing:
            return
        closers = tuple(run[i] for i in closing)
        slots = step.last(layer, self.state_kind, closers, (2 if self.overlaps else 1) * r)
        held, _ = gather(step.pool(layer, self.state_kind), slots)
        fresh = self.pool(held[:, r:], held[:, :r], slots[:, 0] >= 0) if self.overlaps else self.pool(held, None, None)
        numbers = tuple(s.first // r for s in closers)
        turns = [angles.entries(self.rope, n, 1, r) for n in numbers]
        fresh = rotate(fresh.to(self.wkv.weight.dtype), torch.cat(turns))
        step.write(layer, self.kind, closers, numbers, fresh)

    def pool(self, windows: Tensor, before: Tensor | None, has_before: Tensor | None) -> Tensor:
        """Entries [n, D] fp32 of whole windows [n, r, 2 W] and, overlapping, those before them."""
        values, gates = windows.split(self.width, -1)
        gates = gates + self.ape
        if before is not None and has_before is not None:
            D = self.dim
            values_before, gates_before = before.split(self.width, -1)
            gates_before = (gates_before + self.ape).masked_fill(~has_before[:, None, None], -torch.inf)
            values = torch.cat([values_before[..., :D], values[..., D:]], 1)
            gates = torch.cat([gates_before[..., :D], gates[..., D:]], 1)
        return self.norm((torch.softmax(gates, 1) * values).sum(1))
