"""What is said when a function of the user's fails: short, and with the user's own lines.

Does not know: where the function was called from.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping
from typing import Any

from ..errors import UserCodeError

ROW_CHARACTERS = 200
_FRAMES = 3
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def failed(error: Exception, *, what: str, function: str, row: Mapping[str, Any] | None = None) -> UserCodeError:
    """The error for what a function raised; raise it from `error`. `what` is its part in the job: "map"."""
    shown = cut(row) if row is not None else ""
    place = f" on the row {shown}" if shown else ""
    message = f"{what} function {function!r} failed{place}: {type(error).__name__}: {error}\n{_lines(error)}"
    return UserCodeError(message.rstrip(), function=function, row=shown)


def cut(value: object) -> str:
    """`repr`, cut short."""
    try:
        text = repr(value)
    except Exception as error:
        text = f"<{type(value).__name__} whose repr raises {type(error).__name__}>"
    return text if len(text) <= ROW_CHARACTERS else text[: ROW_CHARACTERS - 3] + "..."


def name_of(function: object) -> str:
    """What to call a function, a partial, or an object that is called."""
    inner = getattr(function, "func", function)
    return str(getattr(inner, "__qualname__", None) or type(function).__qualname__)


def _lines(error: Exception) -> str:
    """The last frames in the user's own files, or where it was raised if none is."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_PACKAGE)]
    own = [f for f in frames if not any(part in f.filename for part in ("site-packages", "dist-packages"))]
    chosen = own[-_FRAMES:] or frames[-1:]
    return "".join(traceback.format_list(chosen))
