"""The rows of many sequences, in pools that all layers and all sequences share.

Kinds that keep all their rows have a pool of pages; a page holds 128 source tokens of one sequence, in all layers and
kinds at once, so one table of pages per sequence addresses everything. Kinds that keep the last rows only have a ring
per sequence, `trailing + drafts` rows long: row p lies at p modulo the ring's size. A sequence can therefore be cut
back to `drafts` tokens before the furthest it ever reached, and opened anew at any page boundary whose window somebody
hands back (`import_`).

A sequence is a value: `export` copies rows out by kind, `import_` puts them back, here or in another cache of the same
spec. The cache knows nothing of models: attention reads and writes through a `Step` (`step.py`).

Invariants: a page belongs to one sequence or to none; rows at or after a sequence's length mean nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ContextError
from .spec import PAGE_TOKENS, CacheSpec, RowSpec

Rows = dict[tuple[int, str], Tensor]
"""Rows by (layer, kind): [rows, width]."""


@dataclass(slots=True)
class _Sequence:
    length: int = 0
    pages: list[int] = field(default_factory=list)
    adjoining: bool = True
    """Whether its pages follow one another in the pool: then its rows are a slice and nothing is gathered."""
    floor: int = 0
    """The shortest length, 0 aside, whose last rows the rings still hold."""
    known: int = 0
    """Tokens whose rows of kinds that keep all are there, though the sequence may be shorter (`replay`)."""


class Cache:
    """Pools for `sequences` sequences with `pages * 128` tokens between them."""

    def __init__(
        self,
        spec: CacheSpec,
        *,
        sequences: int,
        pages: int,
        drafts: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        assert sequences > 0 and pages > 0 and drafts >= 0
        self.spec, self.sequences, self.pages, self.drafts = spec, sequences, pages, drafts
        self.device = torch.device(device)
        self._has_rings = any(row.trailing is not None for rows in spec.layers for row in rows)
        self._pools: Rows = {}
        for layer, rows in enumerate(spec.layers):
            for row in rows:
                count = pages * row.rows_per_page if row.trailing is None else sequences * self.ring(row)
                self._pools[layer, row.kind] = torch.zeros(count, row.width, dtype=row.dtype, device=device)
        self._free = list(range(pages - 1, -1, -1))
        self._open: dict[int, _Sequence] = {}
        self.tables = torch.zeros(sequences, pages, dtype=torch.int64, device=device)
        """Pages of each sequence, in order; what lies behind its last page means nothing."""

    def ring(self, row: RowSpec) -> int:
        """Rows of a sequence's ring."""
        assert row.trailing is not None
        return row.trailing + self.drafts

    def pool(self, layer: int, kind: str) -> Tensor:
        return self._pools[layer, kind]

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self._pools.values())

    def open(self) -> int:
        """A new, empty sequence. Raises ContextError when all are taken."""
        for sequence in range(self.sequences):
            if sequence not in self._open:
                self._open[sequence] = _Sequence()
                return sequence
        raise ContextError(f"all {self.sequences} sequences of the cache are taken: close one, or make it larger")

    def close(self, sequence: int) -> None:
        """Its pages are free again."""
        self._release(self._open.pop(sequence).pages)

    def length(self, sequence: int) -> int:
        """Tokens of the sequence."""
        return self._open[sequence].length

    def adjoining(self, sequence: int) -> int | None:
        """The first page, when the others follow it in the pool; else None."""
        held = self._open[sequence]
        return held.pages[0] if held.pages and held.adjoining else None

    def lacks(self, sequence: int, tokens: int) -> int:
        """Pages that the sequence would take for `tokens` tokens in all."""
        return max(0, -(-tokens // PAGE_TOKENS) - len(self._open[sequence].pages))

    def reserve(self, sequence: int, tokens: int) -> None:
        """Pages for `tokens` tokens in all. Raises ContextError, having taken none, when there are too few."""
        held = self._open[sequence]
        wanted = self.lacks(sequence, tokens)
        if wanted == 0:
            return
        if wanted > len(self._free):
            raise ContextError(
                f"{tokens} tokens need {wanted} more pages of {PAGE_TOKENS} tokens, and {len(self._free)} are free"
            )
        for _ in range(wanted):
            page = self._free.pop()
            held.adjoining = not held.pages or (held.adjoining and page == held.pages[-1] + 1)
            self.tables[sequence, len(held.pages)] = page
            held.pages.append(page)

    def begin(self, sequence: int, end: int) -> None:
        """Rows up to `end` will be written, and rings forget what lay in their places, even if the call then fails.

        Raises ContextError when the rows that the sequence goes on from are not there.
        """
        held = self._open[sequence]
        if not self._has_rings:
            return
        if held.length and held.length < held.floor:
            raise ContextError(
                f"sequence {sequence} can't go on from {held.length} tokens: its rings lack the last rows, as a call "
                "failed or an import came without them; begin it anew"
            )
        held.floor = max(held.floor, end - self.drafts)

    def advance(self, sequence: int, length: int) -> None:
        """The sequence has `length` tokens now; their rows were written."""
        held = self._open[sequence]
        assert held.length <= length <= len(held.pages) * PAGE_TOKENS
        held.length = length

    def truncate(self, sequence: int, length: int) -> None:
        """Forgets the tokens from `length` on; pages that hold none any more are free again.

        The rings allow for `drafts` tokens less than the sequence ever had, for what was imported and longer, and for
        none at all: what lies further back is overwritten.
        """
        held = self._open[sequence]
        assert 0 <= length <= held.length and (length == 0 or held.known <= held.length)
        if self._has_rings and 0 < length < held.floor:
            raise ContextError(
                f"{held.length - length} tokens can't be cut off: rings keep {self.drafts} drafts, and allow for no "
                f"less than {held.floor} tokens now"
            )
        keep = -(-length // PAGE_TOKENS)
        self._release(held.pages[keep:])
        del held.pages[keep:]
        held.length, held.known = length, 0
        if length == 0:
            held.floor = 0

    def export(self, sequence: int, begin: int, end: int) -> Rows:
        """Copies of the rows of tokens `begin` to `end`, by layer and kind.

        Both must be multiples of the page, or `end` the sequence's length. Of kinds that keep the last rows: those
        before `end` that are needed to go on, if it is the length; none otherwise.
        """
        held = self._open[sequence]
        assert held.known <= held.length, "a sequence that replays has not the rows that it goes on from"
        assert begin % PAGE_TOKENS == 0 and begin <= end <= held.length
        assert end % PAGE_TOKENS == 0 or end == held.length
        out: Rows = {}
        for layer, rows in enumerate(self.spec.layers):
            for row in rows:
                if row.trailing is None:
                    out[layer, row.kind] = self.read(
                        layer, row, sequence, begin // row.tokens, end // row.tokens
                    ).clone()
                elif end == held.length:
                    out[layer, row.kind] = self.read(layer, row, sequence, end - row.needed(end), end).clone()
        return out

    def import_(self, sequence: int, begin: int, end: int, rows: Rows) -> None:
        """Puts back what `export` gave of tokens `begin` to `end`; the sequence then has `end` tokens, whatever it had
        from `begin` on.

        A sequence without its trailing rows (an export that ended before the length) can only be added to by further
        imports: a forward call raises ContextError until one brings them, unless no layer keeps any.
        """
        held = self._open[sequence]
        assert begin <= held.length or held.length == 0
        assert begin % PAGE_TOKENS == 0
        self.reserve(sequence, end)
        for layer, specs in enumerate(self.spec.layers):
            for row in specs:
                given = rows.get((layer, row.kind))
                if given is None:
                    continue
                last = end // row.tokens
                count = last - begin // row.tokens if row.trailing is None else row.needed(end)
                assert given.shape == (count, row.width), f"rows {layer}, {row.kind}: {tuple(given.shape)}"
                self.pool(layer, row.kind)[self.slots(row, sequence, last - given.shape[0], last)] = given
        rings = all((i, r.kind) in rows for i, specs in enumerate(self.spec.layers) for r in specs if r.trailing)
        held.length, held.known = end, 0
        held.floor = end if rings else end + 1

    def replay(self, sequence: int, begin: int) -> None:
        """Has a sequence go through its tokens from `begin` on once more, a page's end, to fill its rings.

        Rows of kinds that keep all stay, and are not written again until the sequence is as long as it was. Rings
        begin with zeros: what is computed first is wrong where it would have seen what lay there, by a window more in
        every layer, and right behind that (`prefix`).
        """
        held = self._open[sequence]
        assert begin % PAGE_TOKENS == 0 and begin <= held.length
        held.known, held.length, held.floor = held.length, begin, begin
        for layer, rows in enumerate(self.spec.layers):
            for row in rows:
                if row.trailing is not None:
                    self.pool(layer, row.kind)[sequence * self.ring(row) : (sequence + 1) * self.ring(row)] = 0

    def known(self, sequence: int) -> int:
        """Tokens whose rows of kinds that keep all are not to be written: more than its length while it replays."""
        return self._open[sequence].known

    def read(self, layer: int, row: RowSpec, sequence: int, begin: int, end: int) -> Tensor:
        """Rows `begin` to `end` of a sequence: [end - begin, width]. A view where its pages adjoin, else a copy."""
        pool = self.pool(layer, row.kind)
        if row.trailing is None:
            first = self.adjoining(sequence)
            if first is not None:
                base = first * row.rows_per_page
                return pool[base + begin : base + end]
        return pool[self.slots(row, sequence, begin, end)]

    def slots(self, row: RowSpec, sequence: int, begin: int, end: int) -> Tensor:
        """int64 [end - begin]: where rows `begin` to `end` lie in their pool."""
        numbers = torch.arange(begin, end, device=self.device)
        if row.trailing is None:
            per_page = row.rows_per_page
            return self.tables[sequence][numbers // per_page] * per_page + numbers % per_page
        return sequence * self.ring(row) + numbers % self.ring(row)

    def _release(self, pages: list[int]) -> None:
        self._free.extend(reversed(pages))
