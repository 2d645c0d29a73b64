"""Jobs that run in fresh processes, so that start-up is part of what they cost, and what they cost.

Invariants: jobs that are compared run in turn, round by round, and each round begins with another one; what a job made
is checked after its first run, and removed before its next and at the end.

Does not know: what a job does. It is a command; if it prints JSON objects, the last one holds numbers of its own.
"""

from __future__ import annotations

import compileall
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .runner import OURS, Row, Seconds

ROOT = Path(__file__).resolve().parent.parent
PROBE = Path(__file__).with_name("process_probe.py")
TIMEOUT_S = 1200.0


class JobFailed(Exception):
    """A job ended badly; with what it wrote last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What one side does."""

    command: Sequence[str]
    outputs: Sequence[Path] = ()
    """Made by it."""
    check: Callable[[], None] = lambda: None
    """Raises WrongResult if the outputs are not right."""
    watches_memory: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What one run took."""

    wall_s: float
    """From its start to the end of the command's own process."""
    cpu_s: float
    """User and system time of every process that it started, and that those did."""
    pss_bytes: Mapping[str, int]
    """Memory at the worst moment of each, if it was watched: "main" is the command's own process, "below" all those
    that it and they started in sum, "beside" the daemons that no longer are below it."""
    told: Mapping[str, float] = field(default_factory=dict)
    """What it said itself."""


def run_job(job: Job) -> Cost:
    """Once. Raises JobFailed."""
    _remove(job.outputs)
    order = {"command": list(job.command), "timeout_s": TIMEOUT_S, "watches_memory": job.watches_memory}
    command = [sys.executable, "-S", "-E", str(PROBE), json.dumps(order)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    if done.returncode:
        raise JobFailed(done.stderr[-4000:])
    found = json.loads(done.stdout)
    lines = [line for line in found["printed"].splitlines() if line.startswith("{")]
    if found["status"]:
        raise JobFailed(f"{' '.join(job.command)[:200]} ... ended with {found['status']}\n{done.stderr[-4000:]}")
    return Cost(
        wall_s=found["wall_s"],
        cpu_s=found["cpu_s"],
        pss_bytes=found["pss_bytes"],
        told=json.loads(lines[-1]) if lines else {},
    )


def _remove(outputs: Sequence[Path]) -> None:
    for output in outputs:
        if output.is_dir():
            shutil.rmtree(output)
        output.unlink(missing_ok=True)


@functools.cache
def _compile() -> None:
    """Our code as bytecode, as pip leaves that of an installed package: else, where Python is told to write none, each
    process of ours compiles it again, and no peer's does."""
    for component in ("fs", "dataflow", "kvcache", "emberline"):
        compileall.compile_dir(ROOT / component, quiet=2)


def interleave(jobs: Mapping[str, Job], rounds: int) -> dict[str, list[Cost]]:
    """The costs of each job, round by round. Raises JobFailed and WrongResult."""
    _compile()
    costs: dict[str, list[Cost]] = {name: [] for name in jobs}
    names = list(jobs)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            costs[name].append(run_job(jobs[name]))
            if number == 0:
                jobs[name].check()
    for job in jobs.values():
        _remove(job.outputs)
    return costs


Measure = Callable[[Cost], float]


def cpu_s(cost: Cost) -> float:
    """CPU seconds."""
    return cost.cpu_s


def wall_s(cost: Cost) -> float:
    """Wall seconds."""
    return cost.wall_s


def cost_row(
    row: str,
    measure: Measure,
    costs: Mapping[str, Sequence[Cost]],
    *,
    ours: str = OURS,
    peers: Sequence[str] = (),
    baseline: str | None = None,
    goal: float | None = None,
) -> Row:
    """A row that compares costs; `ours` is the job that stands for us, `baseline` the one that `goal` is a multiple of.

    Peers that did not run are left out, and with the baseline the goal.
    """
    if baseline is not None and baseline not in costs:
        baseline = goal = None
    shown = [name for name in dict.fromkeys([*peers, *([baseline] if baseline else [])]) if name in costs]
    medians = {name: statistics.median(map(measure, costs[name])) for name in [ours, *shown]}
    return Row(
        row=row,
        ours=medians[ours],
        peers={name: medians[name] for name in shown},
        ratio=None if baseline is None else paired_ratio(measure, costs[ours], costs[baseline]),
        baseline=baseline,
        goal=goal,
        at_most=True,
        seconds={OURS if name == ours else name: _seconds(costs[name]) for name in [ours, *shown]},
    )


def paired_ratio(measure: Measure, ours: Sequence[Cost], others: Sequence[Cost]) -> float:
    """The median of the rounds' own ratios."""
    return statistics.median(measure(mine) / measure(other) for mine, other in zip(ours, others, strict=True))


def _seconds(costs: Sequence[Cost]) -> Seconds:
    return Seconds(wall=statistics.median(map(wall_s, costs)), cpu=statistics.median(map(cpu_s, costs)))
