"""Memory of large results is used again, and only when nobody has any of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from embertrain import kernels
from embertrain.kernels import memory

ROWS = memory.LARGE_BYTES // 4 // 1024
LIKE = torch.empty(0)


@pytest.fixture(autouse=True)
def _own_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_blocks", memory.Blocks())


def test_memory_that_nobody_has_is_used_again() -> None:
    first = kernels.large(LIKE, ROWS, 1024)
    place = first.data_ptr()
    assert first.shape == (ROWS, 1024) and first.dtype == torch.float32 and first.is_contiguous()
    del first
    assert kernels.large(LIKE, ROWS, 1024).data_ptr() == place
    halves = kernels.large(LIKE.bfloat16(), 2, ROWS, 1024)
    assert halves.data_ptr() == place and halves.dtype == torch.bfloat16, "the type does not matter"


HOLDERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "view": lambda x: x[3:4],
    "detached": torch.Tensor.detach,
    "storage": torch.Tensor.untyped_storage,
    "numpy": torch.Tensor.numpy,
    "graph": lambda x: (x * torch.ones(1, requires_grad=True)).sum(),
}


@pytest.mark.parametrize("kept", HOLDERS)
def test_what_shares_it_keeps_it(kept: str) -> None:
    first = kernels.large(LIKE, ROWS, 1024).fill_(1.0)
    place = first.data_ptr()
    holder = HOLDERS[kept](first)
    del first
    other = kernels.large(LIKE, ROWS, 1024)
    assert other.data_ptr() != place
    del holder
    both = [kernels.large(LIKE, ROWS, 1024) for _ in range(2)]
    assert place in {each.data_ptr() for each in both}, "and then it is used again"


def test_a_parameters_gradient_is_taken_as_it_is() -> None:
    class Large(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, weight: torch.Tensor) -> torch.Tensor:
            return weight.sum()

        @staticmethod
        def backward(ctx: object, *grads: torch.Tensor) -> torch.Tensor:
            return kernels.large(LIKE, ROWS, 1024).fill_(float(grads[0]))

    weight = torch.zeros(ROWS, 1024, requires_grad=True)
    places = set()
    for step in range(3):
        (Large.apply(weight) * (step + 1)).backward()
        assert weight.grad is not None and float(weight.grad[-1, -1]) == step + 1
        places.add(weight.grad.data_ptr())
        weight.grad = None
    assert len(places) == 1


def test_without_counts_that_tell_it_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory._IS_COUNTED, "or nothing here was tested"
    monkeypatch.setattr(memory, "_IS_COUNTED", False)
    assert kernels.large(LIKE, ROWS, 1024).shape == (ROWS, 1024)
    assert memory._blocks._bytes == 0


def test_what_is_small_or_too_much_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "KEPT_BYTES_MAX", 2 * memory.LARGE_BYTES)
    held = [kernels.large(LIKE, ROWS, 1024) for _ in range(4)]
    assert len({each.data_ptr() for each in held}) == 4
    assert memory._blocks._bytes == 2 * memory.LARGE_BYTES
    kernels.large(LIKE, 10)
    assert memory._blocks._bytes == 2 * memory.LARGE_BYTES
