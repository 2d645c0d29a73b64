"""How rows lie in the bytes of a page: what `Cache.export` gives, layer by layer, kinds in the order of the spec.

A page has two payloads. `rows` is what its 128 tokens have in kinds that keep all. `states` is what a sequence that
ends with the page needs of kinds that keep the last rows: windows, and of compressors the 4 tokens that the next
window overlaps. Numbers are as the machine has them, little-endian (docs/formats.md).

P pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache.cache import Rows
from ..cache.spec import PAGE_TOKENS, CacheSpec, RowSpec

_FAR = PAGE_TOKENS << 20
"""The end of a page that no window reaches back from to the beginning."""


@dataclass(frozen=True, slots=True)
class _Field:
    layer: int
    row: RowSpec
    count: int
    begin: int
    """Where it begins in the payload, in bytes."""

    @property
    def end(self) -> int:
        return self.begin + self.count * self.row.row_bytes


class Layout:
    """Of the pages of one cache."""

    def __init__(self, spec: CacheSpec) -> None:
        every = [(layer, row) for layer, rows in enumerate(spec.layers) for row in rows]
        self._rows = _placed([(layer, row, row.rows_per_page) for layer, row in every if row.trailing is None])
        self._states = _placed([(i, row, row.needed(_FAR)) for i, row in every if row.trailing is not None])

    @property
    def rows_bytes(self) -> int:
        """Of the payload `rows`."""
        return self._rows[-1].end

    @property
    def states_bytes(self) -> int:
        """Of the payload `states`; 0: there is none."""
        return self._states[-1].end if self._states else 0

    def pack_rows(self, rows: Rows, pages: int) -> Tensor:
        """uint8 [P, rows_bytes] of an export of so many pages."""
        out = torch.empty(pages, self.rows_bytes, dtype=torch.uint8)
        for each in self._rows:
            given = rows[each.layer, each.row.kind]
            out[:, each.begin : each.end] = _bytes(given).view(pages, -1)
        return out

    def unpack_rows(self, payload: Tensor) -> Rows:
        """The opposite."""
        return {
            (each.layer, each.row.kind): payload[:, each.begin : each.end]
            .view(each.row.dtype)
            .reshape(-1, each.row.width)
            for each in self._rows
        }

    def pack_states(self, rows: Rows) -> Tensor:
        """uint8 [states_bytes] of an export that ends where its sequence does."""
        out = torch.zeros(self.states_bytes, dtype=torch.uint8)
        for each in self._states:
            given = _bytes(rows[each.layer, each.row.kind])
            out[each.end - given.numel() : each.end] = given
        return out

    def unpack_states(self, payload: Tensor, end: int) -> Rows:
        """The opposite, of a sequence of `end` tokens."""
        out: Rows = {}
        for each in self._states:
            begin = each.end - each.row.needed(end) * each.row.row_bytes
            out[each.layer, each.row.kind] = payload[begin : each.end].view(each.row.dtype).view(-1, each.row.width)
        return out


def _placed(wanted: list[tuple[int, RowSpec, int]]) -> tuple[_Field, ...]:
    fields: list[_Field] = []
    for layer, row, count in wanted:
        fields.append(_Field(layer, row, count, fields[-1].end if fields else 0))
    return tuple(fields)


def _bytes(rows: Tensor) -> Tensor:
    return rows.contiguous().cpu().view(torch.uint8).flatten()
