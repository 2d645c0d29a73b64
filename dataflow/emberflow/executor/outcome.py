"""How a call ended, on its way from a worker to whoever waits for it.

An exception travels pickled, with the worker's traceback as a note. One that does not survive pickling, or that would
end the caller's program (SystemExit, KeyboardInterrupt), becomes a `FlowError` with its text.
"""

from __future__ import annotations

import importlib
import pickle
import traceback
from collections.abc import Callable
from functools import reduce
from typing import cast

import msgspec

from ..errors import FlowError
from .base import Context


class Failure(msgspec.Struct, frozen=True):
    """An exception as it travels."""

    pickled: bytes
    """Empty if it cannot be pickled."""
    text: str
    notes: tuple[str, ...]


def resolve(function: str) -> Callable[[bytes, Context], bytes]:
    """The function behind "package.module:function"."""
    module, _, name = function.partition(":")
    return cast("Callable[[bytes, Context], bytes]", reduce(getattr, name.split("."), importlib.import_module(module)))


def outcome_of(function: str, payload: bytes, context: Context) -> bytes | Failure:
    """Runs it here. Whatever it raises is an outcome."""
    try:
        answer = resolve(function)(payload, context)
        assert isinstance(answer, bytes), f"{function} answers with {type(answer).__name__}, not bytes"
        return answer
    except BaseException as error:
        return failure_of(error, where=context.worker)


def failure_of(error: BaseException, *, where: str) -> Failure:
    """Describes `error`, which was raised on the worker named `where`."""
    # The first frame is the one here that calls.
    frames = error.__traceback__.tb_next if error.__traceback__ else None
    trace = "".join(traceback.format_exception(type(error), error, frames)).rstrip()
    try:
        pickled = pickle.dumps(error) if isinstance(error, Exception) else b""
    except Exception:  # Whatever the reduction of somebody's class raises.
        pickled = b""
    notes = (*getattr(error, "__notes__", ()), f"Raised on worker {where}:\n{trace}")
    return Failure(pickled, f"{type(error).__qualname__}: {error}", notes)


def error_of(failure: Failure) -> Exception:
    """The exception again, to raise here."""
    try:
        error = pickle.loads(failure.pickled) if failure.pickled else None
    except Exception:  # Its module is not here, or its constructor wants what pickle does not give.
        error = None
    if not isinstance(error, Exception):
        error = FlowError(failure.text)
    # Not every class keeps its notes when pickled.
    error.__notes__ = list(failure.notes)
    return error
