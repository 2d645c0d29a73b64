"""A job as pictures: its stages with arrows between them, and its tasks along time. SVG as text, coloured by the page.

Stages lie in layers, each as close to its readers as can be; an arrow past a layer gets a place of its own in it, so
that it crosses no box.

Does not know: the page around it, other than its classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from ..quantities import bytes_text, count_text, plural, seconds_text
from .tally import Run, StageTally, Tally

_BOX_WIDTH, _BOX_HEIGHT = 190, 66
_GAP_X, _GAP_Y = 28, 40
_PASS_WIDTH = 20
_LABEL_CHARS = 22

_TIME_WIDTH, _NAME_WIDTH = 900, 130
_LANE, _BAR = 20, 14
_BARS_MAX = 5_000
COLOURS = 8
"""How many the page has for stages: classes c0 to c7."""


def colour_of(stage: int) -> str:
    """The class of a stage's colour."""
    return f"c{stage % COLOURS}"


# ---- the plan


@dataclass(eq=False, slots=True)
class _Spot:
    """A box, or the place where an arrow passes a layer."""

    stage: StageTally | None
    layer: int
    before: list[_Spot]
    x: float = 0.0

    @property
    def width(self) -> int:
        return _PASS_WIDTH if self.stage is None else _BOX_WIDTH


def plan(stages: Mapping[int, StageTally], *, is_running: bool) -> str:
    """The stages as boxes, readers under what they read."""
    layers = _layers(stages)
    width = max(sum(spot.width + _GAP_X for spot in layer) for layer in layers)
    height = len(layers) * (_BOX_HEIGHT + _GAP_Y) - _GAP_Y
    arrows, boxes = [], []
    for layer in layers:
        x = (width - sum(spot.width + _GAP_X for spot in layer) + _GAP_X) / 2
        for spot in layer:
            spot.x = x + spot.width / 2
            x += spot.width + _GAP_X
    for spot in itertools.chain(*layers):
        arrows += [_arrow(before, spot) for before in spot.before]
        if spot.stage is not None:
            boxes.append(_box(spot, is_running=is_running))
    return _svg(width, height + 4, "plan", [*arrows, *boxes])


def _layers(stages: Mapping[int, StageTally]) -> list[list[_Spot]]:
    readers: dict[int, list[int]] = {id: [] for id in stages}
    for stage in stages.values():
        for id in stage.inputs:
            if id in readers:
                readers[id].append(stage.id)
    depths: dict[int, int] = {}
    # They are in the order in which they began: each comes after what it reads.
    for id in reversed(list(stages)):
        depths[id] = 1 + max((depths[reader] for reader in readers[id] if reader in depths), default=-1)
    last = max(depths.values())
    layers: list[list[_Spot]] = [[] for _ in range(last + 1)]
    spots: dict[int, _Spot] = {}
    for id in stages:
        spots[id] = spot = _Spot(stages[id], last - depths[id], [])
        layers[spot.layer].append(spot)
        for input in dict.fromkeys(stages[id].inputs):
            if input in spots:
                spot.before.append(_passing(spots[input], spot.layer, layers))
    for layer in layers[1:]:
        order = {spot: place for above in layers for place, spot in enumerate(above)}
        layer.sort(key=lambda spot: sum(order[b] for b in spot.before) / len(spot.before) if spot.before else 1e9)
    return layers


def _passing(start: _Spot, layer: int, layers: list[list[_Spot]]) -> _Spot:
    """From `start` down to just above `layer`, by places of its own."""
    for between in range(start.layer + 1, layer):
        start = _Spot(None, between, [start])
        layers[between].append(start)
    return start


def _top(spot: _Spot) -> int:
    return 2 + spot.layer * (_BOX_HEIGHT + _GAP_Y)


def _arrow(start: _Spot, end: _Spot) -> str:
    y1, y2 = _top(start) + _BOX_HEIGHT, _top(end)
    # Through the height of a layer that it passes, it goes straight.
    down = f"M{start.x:.0f} {y1 - _BOX_HEIGHT if start.stage is None else y1} V{y1}"
    head = "" if end.stage is None else f'<path class="head" d="M{end.x:.0f} {y2} l-4 -7 h8 z"/>'
    middle = (y1 + y2) / 2
    curve = f"C{start.x:.0f} {middle:.0f} {end.x:.0f} {middle:.0f} {end.x:.0f} {y2 - (5 if head else 0)}"
    return f'<path class="arrow" d="{down} {curve}"/>{head}'


def _box(spot: _Spot, *, is_running: bool) -> str:
    stage = spot.stage
    assert stage is not None
    state = "reused" if stage.tasks and stage.reused >= stage.tasks else "complete"
    if not stage.is_done:
        state = "running" if is_running else "unfinished"
    label = stage.label if len(stage.label) <= _LABEL_CHARS else f"{stage.label[: _LABEL_CHARS - 1]}…"
    tasks = plural(stage.tasks, "task") if stage.is_done else f"{stage.done} of {plural(stage.tasks, 'task')}"
    lines = [
        f"{tasks}{', reused' if state == 'reused' else ''}",
        f"{count_text(stage.rows)} rows, {bytes_text(stage.size_bytes)}",
    ]
    left, top = spot.x - _BOX_WIDTH / 2, _top(spot)
    texts = "".join(
        f'<text class="small" x="{left + 14:.0f}" y="{top + 40 + 16 * row}">{escape(line)}</text>'
        for row, line in enumerate(lines)
    )
    return (
        f'<a href="#stage-{stage.id}"><g class="box {state}"><title>{escape(stage.label)}</title>'
        f'<rect x="{left:.0f}" y="{top}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" rx="6"/>'
        f'<rect class="mark {colour_of(stage.id)}" x="{left:.0f}" y="{top}" width="5" height="{_BOX_HEIGHT}"/>'
        f'<text x="{left + 14:.0f}" y="{top + 21}">{stage.id} {escape(label)}</text>{texts}</g></a>'
    )


# ---- the timeline


def timeline(tally: Tally) -> str:
    """A lane for each worker, and more for one that runs several tasks at once; a bar for each task."""
    end_s = max(tally.at_s, 1e-3)
    scale = (_TIME_WIDTH - 10) / end_s
    shown = sorted(tally.runs, key=lambda run: -run.seconds)[:_BARS_MAX]
    parts: list[str] = []
    lanes = 0
    for worker in tally.workers:
        rows = _rows_of(run for run in shown if run.worker == worker)
        parts.append(_text(_NAME_WIDTH - 8, lanes * _LANE + 15, worker or "?", "name"))
        for row in rows:
            parts += [_bar(tally, run, lanes * _LANE + 3, scale) for run in row]
            lanes += 1
        lanes += not rows
        parts.append(f'<path class="rule" d="M0 {lanes * _LANE}H{_NAME_WIDTH + _TIME_WIDTH}"/>')
    if tally.troubles:
        parts.append(_text(_NAME_WIDTH - 8, lanes * _LANE + 15, "trouble", "name"))
        parts += [
            f'<path class="trouble" d="M{_NAME_WIDTH + event.at_s * scale:.1f} {lanes * _LANE + 3}l5 13h-10z">'
            f"<title>{seconds_text(event.at_s)}: {event.kind}, {escape(tally.name_of(event))}\n"
            f"{escape(str(event.data.get('error', '')))}</title></path>"
            for event in tally.troubles[:_BARS_MAX]
        ]
        lanes += 1
    height = lanes * _LANE
    for at_s in _ticks(end_s):
        x = _NAME_WIDTH + at_s * scale
        parts.insert(0, f'<path class="rule" d="M{x:.1f} 0V{height}"/>')
        parts.append(_text(x, height + 16, _clock(at_s), "tick"))
    return _svg(_NAME_WIDTH + _TIME_WIDTH + 24, height + 24, "timeline", parts)


def _rows_of(runs: Iterable[Run]) -> list[list[Run]]:
    """The runs in as few rows as there are at once, so that none hides another."""
    rows: list[list[Run]] = []
    for run in sorted(runs, key=lambda run: run.start_s):
        # A worker takes the next task up a moment before the driver hears of the end of the last.
        slack_s = min(run.seconds, 0.05)
        row = next((row for row in rows if row[-1].end_s <= run.start_s + slack_s), None)
        if row is None:
            rows.append(row := [])
        row.append(run)
    return rows


def _bar(tally: Tally, run: Run, y: int, scale: float) -> str:
    told = ", ".join(
        [
            tally.name_of(run),
            seconds_text(run.seconds),
            f"{seconds_text(run.cpu_s)} CPU",
            f"{run.rows:,} rows",
            bytes_text(run.size_bytes),
        ]
    )
    width = max(1.0, run.seconds * scale - 0.5)
    return (
        f'<rect class="{colour_of(run.stage)}" x="{_NAME_WIDTH + run.start_s * scale:.1f}" y="{y}" '
        f'width="{width:.1f}" height="{_BAR}" rx="2"><title>{escape(told)}</title></rect>'
    )


def _ticks(end_s: float) -> list[float]:
    """Round times, at most eleven of them."""
    small = (base * 10.0**power for power in range(-4, 1) for base in (1, 2, 5))
    steps = itertools.chain(small, (10, 20, 30), (60 * base * 10**power for power in range(5) for base in (1, 2, 5)))
    step = next(step for step in steps if end_s / step <= 10)
    return [number * step for number in range(int(end_s / step) + 1)]


def _clock(at_s: float) -> str:
    """0.5 -> "500 ms", 20 -> "20 s", 140 -> "2:20"."""
    if at_s < 60:
        return f"{at_s:g} s" if at_s >= 1 or not at_s else f"{at_s * 1000:g} ms"
    hours, rest = divmod(round(at_s), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y}">{escape(text)}</text>'


def _svg(width: float, height: float, kind: str, parts: Sequence[str]) -> str:
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<div class="scroll"><svg class="{kind}" {size}>{"".join(parts)}</svg></div>'
