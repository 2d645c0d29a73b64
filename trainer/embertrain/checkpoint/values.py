"""Plain Python values as JSON text and back, type for type: what a state holds besides tensors.

None, booleans, integers of any size, finite floats, strings and lists stand for themselves. Anything else is an object
with one key that says what it is: {"tuple": [...]}, {"dict": [[key, value], ...]}, {"bytes": base64}, {"float": "nan"}.
Reading runs no code, whatever the text says. (Pickles would; this is why there are none.)
"""

from __future__ import annotations

import base64
import json
import math
from typing import Any

from ..errors import StateError


def encode(value: Any, name: str) -> str:
    """The text of the value that a state has under `name`. Raises StateError for what is not plain."""
    return json.dumps(_plain(value, name), separators=(",", ":"), allow_nan=False)


def decode(text: str) -> Any:
    """The value of a text. Raises ValueError for one that `encode` did not write."""
    return _value(json.loads(text))


def _plain(value: Any, name: str) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind is list:
        return [_plain(each, name) for each in value]
    if kind is tuple:
        return {"tuple": [_plain(each, name) for each in value]}
    if kind is dict:
        return {"dict": [[_plain(key, name), _plain(each, name)] for key, each in value.items()]}
    if kind is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    raise StateError(
        f"{name} holds a {kind.__module__}.{kind.__qualname__}: a checkpoint takes tensors, None, bool, int, float, "
        f"str, bytes, and lists, tuples and dicts of them"
    )


def _value(plain: Any) -> Any:
    if isinstance(plain, list):
        return [_value(each) for each in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, inner),) = plain.items()
    if kind == "tuple":
        return tuple(_value(each) for each in inner)
    if kind == "dict":
        return {_value(key): _value(each) for key, each in inner}
    if kind == "bytes":
        return base64.b64decode(inner)
    if kind == "float":
        return float(inner)
    raise ValueError(f"no such kind of value: {kind}")
