"""What a trace of conversations hits: without end, in caches of some capacities, and by DeepSeek V4's window units.

Nothing is timed: these are the numbers that the simulator has to come to, on Mooncake's conversation trace.
"""

from __future__ import annotations

from pathlib import Path

from emberkv.simulate import simulate, simulate_units
from emberkv.trace import Trace, read_trace
from emberkv.units import UnitRule

from ..runner import Row, verify

CONVERSATIONS = Path(__file__).parents[3] / "shared" / "data" / "traces" / "conversation_trace.jsonl"
"""Not in the repository: without it there are no such rows."""
PUBLISHED = {"pages": 36.64, "tokens": 37.36}
"""Hits in a cache without end, %: exactly these."""
LRU_GOALS = {10_000: 21.15, 30_000: 32.55, 50_000: 35.45}
"""Pages of capacity -> hits, % of all pages."""
KEPT_GOAL = 97.0
"""Of the hits that states of every whole page would give, %."""
STATES_GOAL = 1 / 9
"""Of the pages so many have states."""


def trace_rows() -> list[Row]:
    """Of the conversation trace, if it is there."""
    if not CONVERSATIONS.exists():
        return []
    with CONVERSATIONS.open("rb") as lines:
        trace = read_trace(lines)
    return [*_endless_rows(trace), *_lru_rows(trace), *_window_rows(trace)]


def _endless_rows(trace: Trace) -> list[Row]:
    whole = simulate(trace)
    rows = []
    for what, rate in (("pages", whole.page_rate), ("tokens", whole.token_rate)):
        percent, published = round(100 * rate, 2), PUBLISHED[what]
        verify(percent <= published, f"the simulator hits more {what} than the trace has in common")
        title = f"trace: hits without end, % of {what}"
        rows.append(Row(row=title, ours=percent, peers={"published": published}, goal=published))
    return rows


def _lru_rows(trace: Trace) -> list[Row]:
    return [
        Row(
            row=f"trace: LRU, {capacity:,} pages, hits, %",
            ours=100 * simulate(trace, "lru", capacity).page_rate,
            goal=goal,
        )
        for capacity, goal in LRU_GOALS.items()
    ]


def _window_rows(trace: Trace) -> list[Row]:
    """States at each request's last whole page and every 8,192 tokens, nowhere else."""
    found = simulate_units(trace, UnitRule(page_tokens=trace.page_tokens, sees_common=False))
    states = f"trace: pages with window states, of {found.stored_pages:,}"
    return [
        Row(row="trace: window units, % of the hits of whole pages", ours=100 * found.kept_share, goal=KEPT_GOAL),
        Row(
            row=states,
            ours=found.states,
            ratio=found.state_share,
            baseline="all",
            goal=STATES_GOAL,
            at_most=True,
        ),
    ]
