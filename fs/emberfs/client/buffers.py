"""Memory that reads land in: the caller's own, or a new `bytes` object filled in place."""

from __future__ import annotations

import ctypes
from typing import Any

_new = ctypes.pythonapi.PyBytes_FromStringAndSize
_new.argtypes = [ctypes.c_char_p, ctypes.c_ssize_t]
_new.restype = ctypes.py_object
_address = ctypes.pythonapi.PyBytes_AsString
_address.argtypes = [ctypes.py_object]
_address.restype = ctypes.c_void_p

COPY_BYTES_MAX = 16 << 10
"""Below this a copy is quicker than the detour through ctypes."""

HUGE_PAGE_BYTES = 2 << 20
HUGE_BYTES_MIN = 32 << 20
"""Above this malloc takes fresh memory unless so much lies free on its heap (glibc's largest mmap threshold). It is
asked for in huge pages: a fault per 2 MiB instead of per 4 KiB, and as much fewer address look-ups when the checksum
walks over it. Memory that was in use before has no faults, and keeps its small pages."""

_madvise = getattr(ctypes.CDLL(None), "madvise", None)
_MADV_HUGEPAGE = 14


def _ask_for_huge_pages(address: int, size: int) -> None:
    """Advice for the whole huge pages of a range. The system may take it or not."""
    begin = -(-address // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    end = (address + size) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if _madvise is not None and end > begin:
        _madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_HUGEPAGE)


class NewBytes:
    """A `bytes` of `size` to be filled through `view` and then taken with `finish`.

    The C API allows a bytes object to be written before anybody else has seen it (PyBytes_FromStringAndSize with
    NULL); that is what spares `get` a second copy of everything it returns.
    """

    __slots__ = ("_bytes", "_scratch", "view")

    def __init__(self, size: int) -> None:
        self._bytes: bytes | None = None
        self._scratch: bytearray | None = None
        if size <= COPY_BYTES_MAX:
            self._scratch = bytearray(size)
            self.view = memoryview(self._scratch)
        else:
            fresh: bytes = _new(None, size)
            self._bytes = fresh
            address = _address(fresh)
            if size >= HUGE_BYTES_MIN:
                _ask_for_huge_pages(address, size)
            array = (ctypes.c_char * size).from_address(address)
            array.owner = fresh  # type: ignore[attr-defined]  # Whoever still has a view has the memory too.
            self.view = memoryview(array).cast("B")

    def finish(self, count: int) -> bytes:
        """The first `count` bytes, those that were filled: the rest was never set. The view is void afterwards."""
        self.view.release()
        if self._scratch is not None:
            return bytes(self._scratch) if count == len(self._scratch) else bytes(self._scratch[:count])
        assert self._bytes is not None
        return self._bytes[:count]


def writable_view(buffer: Any) -> memoryview:
    """A flat byte view of a writable buffer: bytearray, mmap, array, numpy; torch tensors through numpy.

    Raises ValueError for a read-only or non-contiguous one.
    """
    view = flat_view(buffer)
    if view.readonly:
        raise ValueError(f"a buffer to read into must be writable: {type(buffer).__name__}")
    return view


def flat_view(buffer: Any) -> memoryview:
    """A flat byte view of any contiguous buffer, without a copy."""
    if type(buffer) is memoryview and buffer.format == "B" and buffer.ndim == 1 and buffer.contiguous:
        return buffer
    if not hasattr(buffer, "__buffer__") and hasattr(buffer, "numpy") and hasattr(buffer, "detach"):
        # A torch tensor: shares memory with its numpy view. bfloat16 has no numpy type, so it goes as bytes.
        tensor = buffer.detach()
        if not tensor.is_contiguous():
            raise ValueError("a tensor must be contiguous: call .contiguous() first")
        flat = tensor.reshape(-1)
        buffer = flat.view(_torch_uint8(tensor)).numpy()
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise ValueError("a buffer must be contiguous")
    return view.cast("B") if view.nbytes else memoryview(bytearray())


def _torch_uint8(tensor: Any) -> Any:
    import torch  # The caller has a tensor, so torch is there.

    return torch.uint8
