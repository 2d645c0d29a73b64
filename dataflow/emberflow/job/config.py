"""How a job is run: what its tasks are given, and how much trouble it takes."""

from __future__ import annotations

from dataclasses import dataclass, field

from .shares import ShareConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class JobConfig:
    """How a job deals with trouble."""

    attempts_max: int = 4
    """Times a task is run before its failure is the job's."""
    cpus_per_task: int = 1
    """DuckDB threads of a task. With one, a task's output is the same bytes each time."""
    straggler_factor: float = 3.0
    """A task that runs so many times as long as half of its stage's did is run a second time beside itself."""
    straggler_s: float = 30.0
    """But never before this."""
    timeout_s: float | None = None
    """The job is cancelled when it has run so long."""
    compression: str | None = None
    """Of exchanges: "lz4" or none."""
    shares: ShareConfig = field(default_factory=ShareConfig)
