"""Hit rates over capacities as a picture: SVG as text, alone or in a page with the numbers. It needs no network.

Does not know: traces, or how the rates came about.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from .simulate import Outcome

_WIDTH, _HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 110, 44, 52
_COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea")
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#374151}.title{font-size:15px;font-weight:600}.tick{font-size:12px}"
    ".rule{stroke:#e5e7eb}.end{stroke:#6b7280;stroke-dasharray:6 4}.line{fill:none;stroke-width:2}"
)
_PAGE_STYLE = (
    "body{font:15px system-ui,sans-serif;margin:2rem;color:#111827}table{border-collapse:collapse}"
    "th,td{padding:.25rem .75rem;text-align:right;border-bottom:1px solid #e5e7eb}"
)


def curve_svg(title: str, outcomes: Sequence[Outcome], without_end: Outcome) -> str:
    """A line for each policy, pages that hit over pages that fit; and where they end."""
    capacities = [outcome.capacity or 1 for outcome in outcomes]
    low, high = math.log10(min(capacities)), math.log10(max(capacities))
    top_rate = max(0.1, math.ceil(without_end.page_rate * 10) / 10)

    def x(capacity: int) -> float:
        share = (math.log10(capacity) - low) / (high - low) if high > low else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(rate: float) -> float:
        return _HEIGHT - _BOTTOM - rate / top_rate * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f"<style>{_STYLE}</style>", '<rect width="100%" height="100%" fill="#fff"/>']
    parts.append(_text(_LEFT, 24, title, "title"))
    for tenth in range(round(top_rate * 10) + 1):
        parts.append(f'<path class="rule" d="M{_LEFT} {y(tenth / 10):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 8, y(tenth / 10) + 4, f"{tenth * 10} %", "tick", anchor="end"))
    parts += [
        _text(x(capacity), _HEIGHT - _BOTTOM + 18, _short(capacity), "tick", anchor="middle")
        for capacity in sorted(set(capacities))
    ]
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 10, "pages that fit", "tick", anchor="middle"))
    end_y = y(without_end.page_rate)
    parts.append(f'<path class="end" d="M{_LEFT} {end_y:.1f}H{_WIDTH - _RIGHT}"/>')
    parts.append(_text(_WIDTH - _RIGHT + 8, end_y - 6, f"no end {without_end.page_rate:.1%}", "tick"))
    for number, policy in enumerate(dict.fromkeys(outcome.policy for outcome in outcomes)):
        points = [outcome for outcome in outcomes if outcome.policy == policy]
        colour = _COLOURS[number % len(_COLOURS)]
        places = [(x(point.capacity or 1), y(point.page_rate)) for point in points]
        parts.append(f'<path class="line" stroke="{colour}" d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in places)}"/>')
        for point, (at_x, at_y) in zip(points, places, strict=True):
            told = escape(f"{policy}, {point.capacity:,} pages: {point.page_rate:.2%}")
            parts.append(
                f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="3.5" fill="{colour}"><title>{told}</title></circle>'
            )
        legend_y = _HEIGHT - _BOTTOM - 12 - 18 * number
        parts.append(f'<rect x="{_WIDTH - _RIGHT + 8}" y="{legend_y - 9}" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(_WIDTH - _RIGHT + 24, legend_y, policy, "tick"))
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>\n'


def curve_page(title: str, outcomes: Sequence[Outcome], without_end: Outcome) -> str:
    """The same with a table, as one HTML page."""
    rows = "".join(
        f"<tr><td>{escape(outcome.policy)}</td><td>{_pages(outcome)}</td><td>{outcome.page_rate:.2%}</td>"
        f"<td>{outcome.token_rate:.2%}</td><td>{outcome.evicted:,}</td></tr>"
        for outcome in (*outcomes, without_end)
    )
    head = "<tr><th>policy</th><th>pages</th><th>page hits</th><th>token hits</th><th>evicted</th></tr>"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_PAGE_STYLE}</style>{curve_svg(title, outcomes, without_end)}<table>{head}{rows}</table></html>\n"
    )


def _pages(outcome: Outcome) -> str:
    return "no end" if outcome.capacity is None else f"{outcome.capacity:,}"


def _short(count: int) -> str:
    """20000 -> "20k"."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:g}{name}"
    return str(count)


def _text(x: float, y: float, text: str, kind: str, *, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
