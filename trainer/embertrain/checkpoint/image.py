"""Tensors laid out one behind the other, as a string of bytes that may be read and written in any pieces.

On a save it is what a rank's files will hold; on a load, the places that the files' bytes go to. A piece that lies
within one tensor of host memory is that memory itself; any other is put together in memory of the caller's.

It does not know files or checksums. Bytes are those of the host: little-endian, which is asserted.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

assert sys.byteorder == "little"


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor's bytes in the image."""

    begin: int
    data: Tensor
    """Flat, uint8, on any device."""

    @property
    def end(self) -> int:
        """Behind its last byte."""
        return self.begin + self.data.numel()


def flat(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in its logical order: its own memory if that is contiguous, else a copy."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def view(data: Tensor) -> memoryview:
    """Flat uint8 host memory as Python's buffers see it."""
    array: Any = data.numpy()
    return memoryview(array)


class Image:
    """Parts in order, which do not overlap; there may be gaps."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = [part for part in parts if part.data.numel()]
        self._begins = [part.begin for part in self._parts]
        assert all(a.end <= b.begin for a, b in zip(self._parts, self._parts[1:], strict=False))

    @property
    def size(self) -> int:
        """Bytes up to the end of the last part."""
        return self._parts[-1].end if self._parts else 0

    @property
    def parts(self) -> Sequence[Part]:
        """In order."""
        return self._parts

    def direct(self, begin: int, end: int) -> Tensor | None:
        """Bytes [begin, end) where they are, if they are one stretch of host memory."""
        found = list(self._within(begin, end))
        if len(found) != 1:
            return None
        part = found[0]
        if part.data.device.type != "cpu" or part.begin > begin or part.end < end:
            return None
        return part.data[begin - part.begin : end - part.begin]

    def gather(self, begin: int, into: Tensor) -> None:
        """Copy bytes from `begin` on into all of `into`. Gaps are left as they are.

        From an accelerator into pinned memory the copies may still be under way when this returns.
        """
        end = begin + into.numel()
        for part in self._within(begin, end):
            a, b = max(begin, part.begin), min(end, part.end)
            into[a - begin : b - begin].copy_(part.data[a - part.begin : b - part.begin], non_blocking=into.is_pinned())

    def scatter(self, begin: int, data: Tensor) -> None:
        """Copy `data`, the bytes from `begin` on, to where they belong."""
        end = begin + data.numel()
        for part in self._within(begin, end):
            a, b = max(begin, part.begin), min(end, part.end)
            part.data[a - part.begin : b - part.begin].copy_(data[a - begin : b - begin])

    def _within(self, begin: int, end: int) -> Iterator[Part]:
        for part in self._parts[max(bisect_right(self._begins, begin) - 1, 0) :]:
            if part.begin >= end:
                return
            if part.end > begin:
                yield part
