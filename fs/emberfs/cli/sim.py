"""`sim`: run the simulated cluster through many seeds, and say which failed and what was covered."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from ..testing.sim.campaign import CELLS, IMPOSSIBLE, Summary, Verdict, campaign, quiet
from .output import json_option, note, plural, print_json, print_line

SEEDS_MAX = 1_000_000


@click.command(
    epilog="\b\nExamples:\n  emberline sim --seeds 100\n  emberline sim --seeds 1 --seed 4711    # one seed again"
)
@click.option("--seeds", type=click.IntRange(1, SEEDS_MAX), default=20, show_default=True, help="How many.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The first of them.")
@click.option("--processes", type=click.IntRange(min=1), help="Default: one per core.")
@json_option
def sim(seeds: int, seed: int, processes: int | None, as_json: bool) -> None:
    """Simulate a cluster under faults, one seed after the other, and check it. Exit code 1 if a seed fails.

    The code of every server and client is the product's; time, network and disks are simulated. A seed replays exactly.
    """
    quiet()
    start_s = time.monotonic()
    summary = Summary()
    for verdict in campaign(range(seed, seed + seeds), processes=processes):
        summary.add(verdict)
        if verdict.failure:
            _tell_failure(verdict)
        elif summary.passed % 100 == 0:
            note(f"{summary.passed} seeds passed")
    if as_json:
        print_json(_as_row(summary, seeds, time.monotonic() - start_s))
    else:
        _print(summary, seeds, time.monotonic() - start_s)
    if summary.failed:
        sys.exit(1)


def _tell_failure(verdict: Verdict) -> None:
    note(f"seed {verdict.seed} FAILED\n{verdict.failure}")


def _as_row(summary: Summary, seeds: int, took_s: float) -> dict[str, Any]:
    return {
        "seeds": seeds,
        "passed": summary.passed,
        "failed": sorted(summary.failed),
        "took_s": round(took_s, 1),
        "operations": summary.operations,
        "operations_min": summary.operations_min,
        "faults": dict(sorted(summary.faults.items())),
        "faults_min": summary.faults_min,
        "virtual_s": round(summary.virtual_s, 1),
        "virtual_s_min": round(summary.virtual_s_min, 1),
        "whole_after_s_max": round(summary.whole_after_s_max, 1),
        "cells": {f"{state} x {report}": summary.cells[state, report] for state, report in CELLS},
        "cells_missed": [f"{state} x {report}" for state, report in summary.missed],
    }


def _print(summary: Summary, seeds: int, took_s: float) -> None:
    reports = list(dict.fromkeys(report for _, report in CELLS))
    print_line("public state x report, how often the manager met it:")
    print_line("".join([" " * 10, *(f"{report:>12}" for report in reports)]))
    for state in dict.fromkeys(state for state, _ in CELLS):
        counts = ["-" if (state, report) in IMPOSSIBLE else str(summary.cells[state, report]) for report in reports]
        print_line("".join([f"{state:10}", *(f"{count:>12}" for count in counts)]))
    if summary.missed:
        print_line(f"not met: {', '.join(f'{state} x {report}' for state, report in summary.missed)}")
    faults = ", ".join(f"{count} {kind}" for kind, count in summary.faults.most_common())
    print_line(f"faults: {faults or 'none'}")
    print_line(
        f"each seed: at least {summary.operations_min} operations, {summary.faults_min} faults and "
        f"{summary.virtual_s_min:.0f} virtual seconds; whole again at most {summary.whole_after_s_max:.1f} s after the "
        "last fault"
    )
    if summary.failed:
        print_line(f"failed: {', '.join(map(str, sorted(summary.failed)))}; again: emberline sim --seeds 1 --seed N")
    print_line(f"{summary.passed} of {plural(seeds, 'seed')} passed in {took_s:.0f} s")
