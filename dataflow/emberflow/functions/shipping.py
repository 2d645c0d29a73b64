"""How functions travel to workers: as bytes that need no copy of the user's files where they arrive.

cloudpickle makes the bytes. Lambdas, nested functions, what `__main__` defines and everything of the user's own modules
(`modules.is_local`) go by value; installed packages by name, so they must be installed where jobs run. The bytes are
for the same minor version of Python, and for now: nothing keeps them. A module of the user's that is imported inside a
function is not seen here: such an import belongs at the top of the file.

Does not know: what a function is for.
"""

from __future__ import annotations

import dis
import pickle
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from types import CodeType, FunctionType
from typing import Any

import cloudpickle

from ..errors import InvalidArgument
from .modules import LocalModules

# Reentrant: what is pickled may hold things that travel by `dumps` themselves.
_registry_lock = threading.RLock()
_local_modules = LocalModules()
_LOADS = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"})
_DEPTH_MAX = 5
"""How many functions deep the search for what cannot travel goes."""


def dumps(value: Any) -> bytes:
    """A function, or a value with functions in it, as bytes. Raises `InvalidArgument`, with the name of the variable
    at fault if it can be found, for what cannot be pickled: open files, locks, connections."""
    with _by_value():
        try:
            return bytes(cloudpickle.dumps(value))
        except Exception as error:
            culprit = _culprit(value, _DEPTH_MAX) if isinstance(value, FunctionType) else None
            where = f": {culprit}" if culprit else ""
            raise InvalidArgument(
                f"{_described(value)} cannot be sent to workers{where} ({type(error).__name__}: {error}); "
                "make such things inside the function"
            ) from error


def loads(data: bytes) -> Any:
    """What `dumps` was given. The bytes must come from our own jobs: loading runs code."""
    try:
        return pickle.loads(data)
    except ModuleNotFoundError as error:
        error.add_note(f"a function was sent that needs {error.name!r}; it must be installed where jobs run")
        raise


def by_fields(value: Any) -> tuple[object, ...]:
    """What `__reduce__` of a dataclass gives that has functions among its fields."""
    return _from_fields, (type(value), dumps({field.name: getattr(value, field.name) for field in fields(value)}))


def _from_fields(kind: type[Any], data: bytes) -> Any:
    return kind(**loads(data))


@contextmanager
def _by_value() -> Iterator[None]:
    """Makes cloudpickle take the user's modules by value. The list is its own and global, so it is put back."""
    with _registry_lock:
        known = {"__main__", *cloudpickle.list_registry_pickle_by_value()}
        # One may be in sys.modules under another name than its own; cloudpickle looks for its own.
        added = [m for m in _local_modules() if m.__name__ not in known and sys.modules.get(m.__name__) is m]
        for module in added:
            cloudpickle.register_pickle_by_value(module)
        try:
            yield
        finally:
            for module in added:
                cloudpickle.unregister_pickle_by_value(module)


def _culprit(function: FunctionType, depth: int) -> str | None:
    """Which variable of a function keeps it from being pickled, in words."""
    for name, value in captured(function):
        try:
            cloudpickle.dumps(value)
        except Exception:
            inner = _culprit(value, depth - 1) if depth and isinstance(value, FunctionType) else None
            return inner or f"{function.__qualname__} uses {name!r}, which is {_described(value)}"
    return None


def captured(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The variables that a function takes along: closure, globals, defaults. In an order of the code's, not of
    chance; a name that is not bound yet is left out."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:
            continue
    for name in sorted(global_names(function.__code__)):
        if name in function.__globals__:
            yield name, function.__globals__[name]
    for position, value in enumerate(function.__defaults__ or ()):
        yield f"default {position + 1}", value
    for name, value in (function.__kwdefaults__ or {}).items():
        yield f"default of {name}", value


def global_names(code: CodeType) -> set[str]:
    """The names that a code object, or one nested in it, looks up among the globals and the builtins."""
    names = {str(op.argval) for op in dis.get_instructions(code) if op.opname in _LOADS}
    nested = [global_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return names.union(*nested)


def _described(value: Any) -> str:
    name = getattr(value, "__qualname__", None)
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return f"the {kind} {name}" if isinstance(name, str) else f"a {kind}"
