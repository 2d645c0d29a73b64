"""The order of samples: a new permutation of them in each epoch, of which any part is computed by itself.

A Feistel network over the smallest power of two that holds all samples: each round adds to one half of a number's bits
a hash of the other half, which can be undone, so no two numbers become one. What falls outside is sent through again
until it falls inside (cycle walking; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).

Invariant: seed, length and position say the sample, in every version: a run that goes on must find what it would have
read. Another rule needs another `ORDER_VERSION`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

ORDER_VERSION = 1

_ROUNDS = 8
_BITS = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class Order:
    """Which of `length` samples comes at which position of the endless sequence of epochs."""

    def __init__(self, length: int, seed: int) -> None:
        assert length > 0
        self.length = length
        self.seed = seed
        bits = max(2, (length - 1).bit_length())
        self._low_bits = np.uint64(bits // 2)
        self._low = np.uint64((1 << bits // 2) - 1)
        self._high = np.uint64((1 << bits - bits // 2) - 1)

    def at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The samples at these positions; position p is in epoch p // length."""
        epochs, places = np.divmod(positions, self.length)
        result = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            result[chosen] = self._permuted(places[chosen].astype(np.uint64), self._keys(epoch))
        return result

    def _keys(self, epoch: int) -> list[np.uint64]:
        key = _mixed((_mixed(self.seed & _BITS) + epoch) & _BITS)
        return [np.uint64(_mixed(key + _GOLDEN * (n + 1) & _BITS)) for n in range(_ROUNDS)]

    def _permuted(self, numbers: npt.NDArray[np.uint64], keys: list[np.uint64]) -> npt.NDArray[np.uint64]:
        result = self._enciphered(numbers, keys)
        while (outside := np.flatnonzero(result >= self.length)).size:
            result[outside] = self._enciphered(result[outside], keys)
        return result

    def _enciphered(self, numbers: npt.NDArray[np.uint64], keys: list[np.uint64]) -> npt.NDArray[np.uint64]:
        low, high = numbers & self._low, numbers >> self._low_bits
        for number, key in enumerate(keys):
            if number % 2:
                low ^= _hashes(high ^ key) & self._low
            else:
                high ^= _hashes(low ^ key) & self._high
        return high << self._low_bits | low


def _hashes(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """`_mixed` of each; arrays of uint64 wrap around by themselves."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


def _mixed(value: int) -> int:
    """The finaliser of SplitMix64: each bit of the result depends on all of `value`'s 64."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _BITS
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _BITS
    return value ^ value >> 31
