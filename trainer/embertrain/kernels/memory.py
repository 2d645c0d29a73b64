"""Large results in huge pages: memory that is new to a process comes 2 MiB at a time instead of 4 KiB.

A gradient of all experts' weights is new memory in each step, and half of its time went into page faults. Linux gives
huge pages to those who ask (`/sys/kernel/mm/transparent_hugepage/enabled`); torch asks only when a variable of the
environment says so before it is imported.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

HUGE_BYTES = 2 << 20

_advise = getattr(ctypes.CDLL(None, use_errno=True), "madvise", None) if sys.platform == "linux" else None
if _advise is not None:
    _advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def in_huge_pages(x: Tensor) -> Tensor:
    """x, contiguous and not yet written to, whose whole 2 MiB are asked to be one page each. Advice: it never fails."""
    if _advise is None or torch.compiler.is_compiling():
        return x
    if x.device.type == "cpu" and x.nbytes >= 2 * HUGE_BYTES:
        begin = -(-x.data_ptr() // HUGE_BYTES) * HUGE_BYTES
        end = (x.data_ptr() + x.nbytes) // HUGE_BYTES * HUGE_BYTES
        _advise(begin, end - begin, mmap.MADV_HUGEPAGE)
    return x
