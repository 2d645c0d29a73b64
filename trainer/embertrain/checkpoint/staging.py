"""Host memory that holds a rank's bytes while they are written, kept from one save to the next.

The first save pays for the memory (pages are touched for the first time, and pinned if there is an accelerator); later
ones only copy. It is taken in blocks, since allocators of pinned memory round a request up to a power of two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .image import Image, Part
from .index import PIECE_BYTES

BLOCK_BYTES = 256 << 20

assert BLOCK_BYTES % PIECE_BYTES == 0  # every piece of an image lies within one block


class Staging:
    """One image at a time: the last one is void once the next is taken."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    def take(self, image: Image) -> Image:
        """A copy of an image."""
        accelerated = torch.accelerator.is_available()
        # This thread's current device need not be the tensors'. What is still to be computed there is waited for, too.
        devices = {part.data.device for part in image.parts if part.data.device.type != "cpu"}
        _synchronise(devices)
        parts = []
        for number, begin in enumerate(range(0, image.size, BLOCK_BYTES)):
            block = self._block(number, min(BLOCK_BYTES, image.size - begin), pinned=accelerated)
            image.gather(begin, block)
            parts.append(Part(begin, block))
        _synchronise(devices)
        return Image(parts)

    def _block(self, number: int, size: int, *, pinned: bool) -> Tensor:
        if number == len(self._blocks):
            self._blocks.append(torch.empty(0, dtype=torch.uint8))
        if self._blocks[number].numel() < size:
            self._blocks[number] = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        return self._blocks[number][:size]


def _synchronise(devices: set[torch.device]) -> None:
    for device in devices:
        torch.accelerator.synchronize(device)
