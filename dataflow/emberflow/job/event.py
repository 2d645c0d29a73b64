"""What a job tells whoever watches it: its record, its progress bar.

| kind | about | data |
|---|---|---|
| stage | a stage begins | label, tasks, reused, inputs (stage ids), explain; rows and size_bytes of what is reused |
| task | an attempt is submitted | attempt, sql |
| rows | a running attempt has come so far | rows |
| output | a task printed | text, in pieces |
| finished | a task's output counts | rows, size_bytes, seconds, cpu_s, spilled_bytes, worker |
| retry | an attempt failed and another follows | error |
| speculate | a straggler is run a second time | |
| recompute | a task's output was damaged and is made again | error |
| done, failed | the job ended | error |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened."""

    kind: str
    stage: int
    """-1: the job as a whole."""
    task: int
    """The task's index in its stage; -1: the stage as a whole."""
    at_s: float
    """Since the job began."""
    data: Mapping[str, Any] = field(default_factory=dict)
