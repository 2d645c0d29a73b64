"""The C part of lanes, if it was built: see hatch_build.py."""

from __future__ import annotations

import importlib
from typing import Any

INTERFACE = 7
"""What we call there. One that was built from other sources is as good as none."""

try:
    native: Any = importlib.import_module("emberfs.lane._native")
except ImportError:
    native = None
else:
    if getattr(native, "INTERFACE", 0) != INTERFACE:
        native = None
