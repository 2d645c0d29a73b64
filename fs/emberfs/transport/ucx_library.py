"""The part of libucp that we use, by ctypes: contexts, workers, one endpoint, tagged messages.

Invariants:
  - A worker belongs to one thread, that of the loop. C never calls back into Python: who wants to know asks.
  - Memory given to `send` or `receive` is in use until the request is done or the worker was destroyed. Nobody but the
    worker (or the network card, at its command) writes to it: a peer has no way past a destroyed worker.
  - Endpoints have no error handling of UCX's own (UCP_ERR_HANDLING_MODE_NONE): with it shared memory is refused and TCP
    copies everything twice (docs/decisions/0014-ucx.md). A request to a lost peer fails or never ends.

Structures are those of UCX 1.22 (ucp/api/ucp.h); each names the fields that it fills, so that a later library which has
more of them takes them too.

Does not know: frames, calls, event loops.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from ctypes import (
    POINTER,
    byref,
    c_char_p,
    c_int,
    c_int8,
    c_size_t,
    c_ssize_t,
    c_uint,
    c_uint32,
    c_uint64,
    c_ulong,
    c_void_p,
)
from typing import Any

from ..errors import Unavailable

API_MAJOR, API_MINOR = 1, 17
"""What we ask of the library; any later 1.x gives it."""

_ANY_BIT = (1 << 64) - 1
_STATUS_LAST = -100
_IN_PROGRESS, _OK, _BUSY = 1, 0, -15
_FEATURE_TAG, _FEATURE_WAKEUP = 1 << 0, 1 << 4
_PARAMS_FEATURES, _WORKER_THREAD_MODE = 1 << 0, 1 << 0
_EP_REMOTE_ADDRESS, _EP_ERR_MODE = 1 << 0, 1 << 1


class UcxError(ConnectionError):
    """The library refused, or a request failed."""


class _Params(ctypes.Structure):
    _fields_ = (
        ("field_mask", c_uint64),
        ("features", c_uint64),
        ("request_size", c_size_t),
        ("request_init", c_void_p),
        ("request_cleanup", c_void_p),
        ("tag_sender_mask", c_uint64),
        ("mt_workers_shared", c_int),
        ("estimated_num_eps", c_size_t),
        ("estimated_num_ppn", c_size_t),
        ("name", c_char_p),
        ("node_local_id", c_size_t),
    )


class _WorkerParams(ctypes.Structure):
    _fields_ = (
        ("field_mask", c_uint64),
        ("thread_mode", c_int),
        ("cpu_mask", c_ulong * 16),
        ("events", c_uint),
        ("user_data", c_void_p),
        ("event_fd", c_int),
        ("flags", c_uint64),
        ("name", c_char_p),
        ("am_alignment", c_size_t),
        ("client_id", c_uint64),
    )


class _EndpointParams(ctypes.Structure):
    _fields_ = (
        ("field_mask", c_uint64),
        ("address", c_void_p),
        ("err_mode", c_int),
        ("err_handler", c_void_p * 2),
        ("user_data", c_void_p),
        ("flags", c_uint),
        ("sockaddr", c_void_p),
        ("sockaddr_length", c_uint32),
        ("conn_request", c_void_p),
        ("name", c_char_p),
        ("local_sockaddr", c_void_p),
        ("local_sockaddr_length", c_uint32),
    )


class _RequestParams(ctypes.Structure):
    """All its fields are optional, and we name none."""

    _fields_ = (("op_attr_mask", c_uint32), ("flags", c_uint32), ("others", c_void_p * 14))


_NO_PARAMS = _RequestParams()

_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ucp_config_read": (c_int8, [c_char_p, c_char_p, POINTER(c_void_p)]),
    "ucp_config_modify": (c_int8, [c_void_p, c_char_p, c_char_p]),
    "ucp_config_release": (None, [c_void_p]),
    "ucp_init_version": (c_int8, [c_uint, c_uint, POINTER(_Params), c_void_p, POINTER(c_void_p)]),
    "ucp_cleanup": (None, [c_void_p]),
    "ucp_worker_create": (c_int8, [c_void_p, POINTER(_WorkerParams), POINTER(c_void_p)]),
    "ucp_worker_destroy": (None, [c_void_p]),
    "ucp_worker_get_address": (c_int8, [c_void_p, POINTER(c_void_p), POINTER(c_size_t)]),
    "ucp_worker_release_address": (None, [c_void_p, c_void_p]),
    "ucp_worker_get_efd": (c_int8, [c_void_p, POINTER(c_int)]),
    "ucp_worker_arm": (c_int8, [c_void_p]),
    "ucp_worker_progress": (c_uint, [c_void_p]),
    "ucp_ep_create": (c_int8, [c_void_p, POINTER(_EndpointParams), POINTER(c_void_p)]),
    "ucp_tag_send_nbx": (c_void_p, [c_void_p, c_void_p, c_size_t, c_uint64, c_void_p]),
    "ucp_tag_recv_nbx": (c_void_p, [c_void_p, c_void_p, c_size_t, c_uint64, c_uint64, c_void_p]),
    "ucp_request_check_status": (c_int8, [c_void_p]),
    "ucp_request_free": (None, [c_void_p]),
}
"""Of each function its result and its arguments. `ucs_status_t` is one signed byte."""


@functools.cache
def library() -> Any:
    """libucp of the wheel `libucx-cu12`. Raises Unavailable where it is not installed or does not load."""
    try:
        loaded = importlib.import_module("libucx").load_library()[-1]
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except (ImportError, OSError, AttributeError) as error:
        raise Unavailable(f"no UCX here ({error}): pip install 'emberline[ucx]'") from error
    return loaded


def _check(status: int, what: str) -> None:
    if status != _OK:
        raise UcxError(f"UCX: {what} failed with status {status}")


class Context:
    """The devices of one kind of transport in this process."""

    def __init__(self, transports: str) -> None:
        """`transports`: as UCX_TLS has it. All else is as UCX's own variables in the environment say.

        Raises UcxError where there is no such device, Unavailable.
        """
        self._ucp = ucp = library()
        config, handle = c_void_p(), c_void_p()
        _check(ucp.ucp_config_read(None, None, byref(config)), "reading the environment")
        try:
            # Lost peers are our business, and each leaves a screenful of warnings.
            for name, value in {"LOG_LEVEL": "fatal", "TLS": transports}.items():
                _check(ucp.ucp_config_modify(config, name.encode(), value.encode()), f"setting {name}={value}")
            params = _Params(field_mask=_PARAMS_FEATURES, features=_FEATURE_TAG | _FEATURE_WAKEUP)
            _check(
                ucp.ucp_init_version(API_MAJOR, API_MINOR, byref(params), config, byref(handle)),
                f"opening {transports}",
            )
        finally:
            ucp.ucp_config_release(config)
        self.handle = handle

    def close(self) -> None:
        """After all of its workers."""
        self._ucp.ucp_cleanup(self.handle)


class Worker:
    """One end of one connection: sends and receives messages by tag."""

    def __init__(self, context: Context) -> None:
        """Raises UcxError."""
        self._ucp = ucp = library()
        self._handle, self._endpoint = c_void_p(), c_void_p()
        params = _WorkerParams(field_mask=_WORKER_THREAD_MODE, thread_mode=0)
        _check(ucp.ucp_worker_create(context.handle, byref(params), byref(self._handle)), "making a worker")
        fd = c_int()
        _check(ucp.ucp_worker_get_efd(self._handle, byref(fd)), "asking for a file descriptor")
        self.fd = fd.value
        """Readable when there is something to do, once after each `arm`."""
        self._params = byref(_NO_PARAMS)

    def address(self) -> bytes:
        """What the other side connects to."""
        address, size = c_void_p(), c_size_t()
        _check(self._ucp.ucp_worker_get_address(self._handle, byref(address), byref(size)), "asking for an address")
        try:
            return ctypes.string_at(address, size.value)
        finally:
            self._ucp.ucp_worker_release_address(self._handle, address)

    def connect(self, address: bytes) -> None:
        """Send to the worker at `address`. It is trusted: UCX does not survive everything. Raises UcxError."""
        place = ctypes.create_string_buffer(address, len(address))
        params = _EndpointParams(
            field_mask=_EP_REMOTE_ADDRESS | _EP_ERR_MODE, address=ctypes.addressof(place), err_mode=0
        )
        _check(self._ucp.ucp_ep_create(self._handle, byref(params), byref(self._endpoint)), "connecting")

    def send(self, view: memoryview, tag: int) -> int:
        """Begin to send; the request, or 0 if the memory is free already. Raises UcxError."""
        request = self._ucp.ucp_tag_send_nbx(self._endpoint, _address(view), len(view), tag, self._params)
        return _request(request)

    def receive(self, view: memoryview, tag: int) -> int:
        """Begin to fill `view`; the request, or 0 if that is done already. Raises UcxError."""
        request = self._ucp.ucp_tag_recv_nbx(self._handle, _address(view), len(view), tag, _ANY_BIT, self._params)
        return _request(request)

    def is_done(self, request: int) -> bool:
        """True once; afterwards the request does not exist any more. Raises UcxError if it failed."""
        status = self._ucp.ucp_request_check_status(request)
        if status == _IN_PROGRESS:
            return False
        self._ucp.ucp_request_free(request)
        _check(status, "a transfer")
        return True

    def progress(self, steps: int) -> bool:
        """Do what can be done now, at most so many steps. True if there was something."""
        progress, handle = self._ucp.ucp_worker_progress, self._handle
        done = 0
        while done < steps and progress(handle):
            done += 1
        return done > 0

    def arm(self) -> bool:
        """Make `fd` tell of the next event. False: there is one already. Raises UcxError."""
        status = self._ucp.ucp_worker_arm(self._handle)
        if status == _BUSY:
            return False
        _check(status, "waiting")
        return True

    def destroy(self) -> None:
        """Nothing is written or read any more when this returns, whatever was under way."""
        self._ucp.ucp_worker_destroy(self._handle)


class _PyBuffer(ctypes.Structure):
    _fields_ = (
        ("buf", c_void_p),
        ("obj", c_void_p),
        ("len", c_ssize_t),
        ("itemsize", c_ssize_t),
        ("readonly", c_int),
        ("ndim", c_int),
        ("format", c_char_p),
        ("shape", c_void_p),
        ("strides", c_void_p),
        ("suboffsets", c_void_p),
        ("internal", c_void_p),
    )


_get_buffer, _release_buffer = ctypes.pythonapi.PyObject_GetBuffer, ctypes.pythonapi.PyBuffer_Release
_get_buffer.argtypes, _release_buffer.argtypes = [ctypes.py_object, POINTER(_PyBuffer), c_int], [POINTER(_PyBuffer)]


def _address(view: memoryview) -> int:
    """`from_buffer` refuses read-only memory, so Python's own function is asked."""
    buffer = _PyBuffer()
    _get_buffer(view, byref(buffer), 0)
    address: int = buffer.buf
    _release_buffer(byref(buffer))
    return address


def _request(pointer: int | None) -> int:
    """What an `nbx` function returned: nothing, a request, or a status at the end of the address space."""
    if pointer is None:
        return 0
    if pointer >= (1 << 64) + _STATUS_LAST:
        raise UcxError(f"UCX: a transfer failed with status {pointer - (1 << 64)}")
    return pointer
