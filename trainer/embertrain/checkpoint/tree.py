"""A nested state as names and leaves: `optimizer.state.0.step` is state["optimizer"]["state"][0]["step"].

Dicts are walked, and lists and tuples in which there are tensors; every other list is one value. An empty dict is a
value too. Keys are strings and integers, and keep their type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ..errors import StateError

Path = tuple[str | int, ...]


def flatten(state: Mapping[Any, Any]) -> dict[str, tuple[Path, Any]]:
    """Name -> (path, leaf), in the order of the state. Raises StateError for keys that cannot be named apart."""
    leaves: dict[str, tuple[Path, Any]] = {}
    for path, leaf in _leaves((), state):
        name = name_of(path)
        if name in leaves:
            raise StateError(f"{leaves[name][0]} and {path} of the state are both called {name}: rename one of them")
        leaves[name] = (path, leaf)
    return leaves


def name_of(path: Path) -> str:
    """What a leaf is called."""
    return ".".join(map(str, path))


def place(state: Any, path: Path, value: Any) -> None:
    """Put a value at a path of a state, making dicts on the way. Raises StateError where the path leads nowhere."""
    here = state
    for depth, step in enumerate(path, 1):
        is_there = isinstance(here, list) and type(step) is int and 0 <= step < len(here)
        if not (isinstance(here, dict) or is_there):
            raise StateError(f"the state has no place for {name_of(path)}, which the checkpoint holds")
        if depth == len(path):
            here[step] = value
        else:
            here = here.setdefault(step, {}) if isinstance(here, dict) else here[step]


def _leaves(path: Path, value: Any) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, Mapping) and (value or not path):
        for key, each in value.items():
            if type(key) not in (str, int):
                raise StateError(f"a key of {name_of(path) or 'the state'} is {key!r}: keys are strings or integers")
            yield from _leaves((*path, key), each)
    elif isinstance(value, list | tuple) and _has_tensor(value):
        for index, each in enumerate(value):
            if isinstance(value, tuple) and not isinstance(each, Tensor):
                raise StateError(f"{name_of(path)} is a tuple of tensors and other values: make it a list")
            yield from _leaves((*path, index), each)
    else:
        yield path, value


def _has_tensor(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    if isinstance(value, Mapping):
        return any(map(_has_tensor, value.values()))
    return isinstance(value, list | tuple) and any(map(_has_tensor, value))
