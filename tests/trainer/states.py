"""States for tests of checkpoints, and what it means that two are the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def state(seed: int) -> dict[str, Any]:
    """A nested state of every kind of leaf."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g)

    return {
        "model": {
            "a.weight": rand(300, 700),
            "half": rand(5, 3).bfloat16(),
            "eighth": rand(9, 8).to(torch.float8_e4m3fn),
            "scalar": rand(),
            "empty": torch.empty(0, 4),
            "turned": rand(30, 40).T,
            "codes": torch.randint(0, 256, (77,), dtype=torch.uint8, generator=g),
            "mask": rand(11) > 0.5,
        },
        "optimizer": {
            "state": {0: {"step": rand(), "moment": rand(7)}, 1: {}},
            "param_groups": [{"lr": 0.1 * seed, "params": [0, 1]}],
            "mixed": [rand(3), seed, {"x": (seed, 2.5), "y": rand(2)}],
            "pair": (rand(2), rand(3)),
        },
        "trainer": {
            "step": seed,
            "rng": (3, (1, 2, 2**80, -(2**70)), None),
            "flags": [True, False, None],
            "name": "ünï\n",
            "raw": b"\x00\xff",
            "odd": {1: {"deep": float("inf")}, "1x": -0.0},
        },
    }


def blank(like: Any) -> Any:
    """The same tree with other numbers in its tensors and no values."""
    if isinstance(like, Tensor):
        return torch.full_like(like, 1)
    if isinstance(like, dict):
        return {key: blank(value) for key, value in like.items()}
    if isinstance(like, list | tuple):
        return type(like)(blank(value) for value in like)
    return None


def differences(a: Any, b: Any, name: str = "state") -> list[str]:
    """Where two states differ: type, order of keys aside, and every bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
        return [] if same else [name]
    if type(a) is not type(b):
        return [f"{name}: {type(a)} and {type(b)}"]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{name}: {list(a)} and {list(b)}"]
        return [found for key in a for found in differences(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{name}: {len(a)} and {len(b)}"]
        return [found for i in range(len(a)) for found in differences(a[i], b[i], f"{name}.{i}")]
    return [] if repr(a) == repr(b) else [f"{name}: {a!r} and {b!r}"]


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in its logical order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
