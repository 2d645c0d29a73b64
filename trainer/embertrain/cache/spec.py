"""What a model keeps of a sequence: the kinds of rows of each layer. No tensor is here.

A layer keeps rows of several kinds. A row stands for 1, 4 or 128 tokens. Kinds that keep `all` grow with the sequence
and live in pages of 128 source tokens; kinds that keep `trailing` tokens live in a ring of a fixed size per sequence.

| kind        | tokens a row | keeps         | what a row is                                                      |
|-------------|--------------|---------------|--------------------------------------------------------------------|
| latent      | 1            | all           | V3: the latent of keys and values, then the rotated shared key      |
| index       | 1 or 4       | all           | V3.2, V4: the indexer's key                                         |
| window      | 1            | trailing 128  | V4: the shared key-and-value row                                    |
| csa, hca    | 4, 128       | all           | V4: a compressed entry                                              |
| state       | 1            | trailing 8/128| V4: what the compressor has of a token until its window is closed   |
| index_state | 1            | trailing 8    | V4: the same of the indexer's own compressor                        |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..model.config import Hybrid, Latent, ModelConfig

PAGE_TOKENS = 128
"""Source tokens of a page: the least common multiple of V4's ratios."""


@dataclass(frozen=True, slots=True)
class RowSpec:
    """One kind of row of one layer."""

    kind: str
    tokens: int
    """Source tokens a row stands for; divides PAGE_TOKENS."""
    width: int
    dtype: torch.dtype
    trailing: int | None = None
    """How many rows back from the end are kept; None: all."""
    closes: int | None = None
    """Rows of a compressor's window, of kinds that keep no more than windows ask for: once one is closed, its rows are
    needed by the next one only, where windows overlap. None: all that are kept are needed."""

    def __post_init__(self) -> None:
        assert PAGE_TOKENS % self.tokens == 0
        assert self.trailing is None or self.tokens == 1

    def needed(self, end: int) -> int:
        """Of a kind that keeps the last rows: how many of those before `end` a sequence goes on from."""
        assert self.trailing is not None
        count = self.trailing if self.closes is None else self.trailing - self.closes + end % self.closes
        return min(count, end)

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    @property
    def rows_per_page(self) -> int:
        return PAGE_TOKENS // self.tokens


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """The rows of every layer, MTP layers after the others; none of a layer that is elsewhere."""

    layers: tuple[tuple[RowSpec, ...], ...]

    @classmethod
    def of(cls, config: ModelConfig, dtype: torch.dtype, *, layers: range | None = None) -> CacheSpec:
        """Of a model that computes in `dtype`, or of a range of its layers: a stage's, or the MTP layers', which are
        numbered after the others and are a step behind, and so have a cache of their own (`Model.predict`)."""
        here = range(len(config.layers)) if layers is None else layers
        every = (*config.layers, *config.mtp)
        assert 0 <= here.start < here.stop <= len(every)
        return cls(tuple(rows_of(layer.attention, dtype) if i in here else () for i, layer in enumerate(every)))

    @property
    def page_bytes(self) -> int:
        """Bytes of PAGE_TOKENS tokens, in kinds that keep all."""
        return sum(r.rows_per_page * r.row_bytes for rows in self.layers for r in rows if r.trailing is None)

    def sequence_bytes(self, drafts: int) -> int:
        """Bytes of the rings of one sequence."""
        return sum((r.trailing + drafts) * r.row_bytes for rows in self.layers for r in rows if r.trailing is not None)


def rows_of(attention: Latent | Hybrid, dtype: torch.dtype) -> tuple[RowSpec, ...]:
    """The rows that one attention keeps."""
    if isinstance(attention, Latent):
        rows = [RowSpec("latent", 1, attention.kv_rank + attention.rope.dim, dtype)]
        if attention.index:
            rows.append(RowSpec("index", 1, attention.index.dim, dtype))
        return tuple(rows)
    rows = [RowSpec("window", 1, attention.head_dim, dtype, trailing=attention.window)]
    if attention.ratio:
        rows.append(RowSpec("csa" if attention.overlaps else "hca", attention.ratio, attention.head_dim, dtype))
        rows.append(_state("state", attention, attention.head_dim))
    if attention.index:
        rows.append(RowSpec("index", attention.ratio, attention.index.dim, dtype))
        rows.append(_state("index_state", attention, attention.index.dim))
    return tuple(rows)


def _state(kind: str, attention: Hybrid, dim: int) -> RowSpec:
    """A token's values and gates, fp32, for its own entry and, overlapping, for the next one as well."""
    series = 2 if attention.overlaps else 1
    return RowSpec(kind, 1, 2 * series * dim, torch.float32, trailing=series * attention.ratio, closes=attention.ratio)
