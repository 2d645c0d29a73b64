"""What one forward call works on: tokens of one or many sequences, packed end to end without padding.

`ids_T` goes in beside a `Batch`, which says for every token whose it is and where it stands. Documents of a training
step, chunks of a prefill and single tokens of a decode are the same thing, a `Segment`: a run of consecutive tokens of
one sequence. Positions are the caller's; nothing here looks at how long a cache is.

T tokens, G segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """`count` tokens of one sequence, from position `first` on; rows `start` to `start + count` of the batch."""

    start: int
    first: int
    count: int
    sequence: int | None = None
    """The sequence in the cache that holds what came before; None: nothing did, and nothing is kept (training)."""

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.first + self.count


@dataclass(frozen=True)
class Batch:
    """Where the T tokens of a forward call stand. Made by `Batch.of`."""

    segments: tuple[Segment, ...]
    logits: tuple[int, ...] | None = None
    """Rows that need logits; None: all."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of(
        cls,
        runs: Sequence[tuple[int, int] | tuple[int, int, int]],
        *,
        logits: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> Batch:
        """`runs` are (first position, count) of whole documents, or (first position, count, sequence) in a cache."""
        segments, start = [], 0
        for first, count, *sequence in runs:
            assert count > 0 and first >= 0
            assert sequence or first == 0, "a run without a cached sequence begins at position 0"
            segments.append(Segment(start, first, count, sequence[0] if sequence else None))
            start += count
        wanted = None if logits is None else tuple(logits)
        return cls(tuple(segments), wanted, torch.device(device))

    @property
    def count(self) -> int:
        """T."""
        last = self.segments[-1]
        return last.start + last.count

    @cached_property
    def positions_T(self) -> Tensor:
        """int64, absolute."""
        if len(self.segments) == 1:
            only = self.segments[0]
            return torch.arange(only.first, only.end, device=self.device)
        if all(s.count == 1 for s in self.segments):
            return torch.tensor([s.first for s in self.segments], device=self.device)
        return torch.cat([torch.arange(s.first, s.end, device=self.device) for s in self.segments])

    @cached_property
    def segment_T(self) -> Tensor:
        """int64: which segment a token belongs to, 0 to G - 1."""
        counts = torch.tensor([s.count for s in self.segments], device=self.device)
        numbers = torch.arange(len(self.segments), device=self.device)
        return torch.repeat_interleave(numbers, counts, output_size=self.count)
