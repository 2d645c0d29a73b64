"""Where the calls of a job run: in this process, in worker processes of this machine, or on a Ray cluster."""

from __future__ import annotations

from .base import Call, Capacity, Context, Executor, Handle
from .capacity import machine_capacity
from .inline import InlineExecutor
from .local import LocalExecutor
from .ray import RayExecutor

__all__ = [
    "Call",
    "Capacity",
    "Context",
    "Executor",
    "Handle",
    "InlineExecutor",
    "LocalExecutor",
    "RayExecutor",
    "machine_capacity",
]
