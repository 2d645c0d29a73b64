"""Large results in huge pages. Run: pytest tests/trainer/test_memory.py."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from embertrain import kernels
from embertrain.kernels import memory
from embertrain.kernels.memory import HUGE_BYTES
from torch import Tensor


def flags_of(x: Tensor, byte: int) -> list[str]:
    """Of the mapping in which a byte of x lies; see proc_pid_smaps(5)."""
    place, flags = x.data_ptr() + byte, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_there = int(found[1], 16) <= place < int(found[2], 16)
        elif line.startswith("VmFlags:") and is_there:
            flags = line
    return flags.split()[1:]


pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="no huge pages to ask for",
)


def test_a_large_result_asks_for_huge_pages() -> None:
    large = kernels.in_huge_pages(torch.empty(5 * HUGE_BYTES, dtype=torch.uint8))
    assert "hg" in flags_of(large, 2 * HUGE_BYTES)
    assert float(large.fill_(1).sum()) == 5 * HUGE_BYTES


def test_only_what_lies_in_it_whole_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(memory, "_advise", lambda begin, length, _: asked.append((begin, length)))
    kernels.in_huge_pages(torch.empty(2 * HUGE_BYTES - 1, dtype=torch.uint8))
    assert asked == []
    x = kernels.in_huge_pages(torch.empty(3 * HUGE_BYTES, dtype=torch.uint8))
    ((begin, length),) = asked
    assert begin % HUGE_BYTES == length % HUGE_BYTES == 0 and length >= 2 * HUGE_BYTES
    assert x.data_ptr() <= begin and begin + length <= x.data_ptr() + x.nbytes
