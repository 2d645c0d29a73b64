"""Deterministic simulation: one seeded scheduler with virtual time under the real services. See `loop`."""

from .disk import SimDisk
from .loop import SimLoop, SimRuntime, run

__all__ = ["SimDisk", "SimLoop", "SimRuntime", "run"]
