"""The C part of lanes, if it was built: see hatch_build.py."""

from __future__ import annotations

import importlib
from typing import Any

try:
    native: Any = importlib.import_module("emberfs.lane._native")
except ImportError:
    native = None
