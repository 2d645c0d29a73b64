"""`emberline kv top`: what a KV-cache service does, interval by interval."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from emberfs.cli.output import human_bytes, json_option, print_columns, print_json, print_line, safe
from emberfs.cli.stats import human_seconds

from .kvservice import address_option, operator_of, tls_option, token_option

if TYPE_CHECKING:
    from emberkv.operator import Operator

_RATES = {
    "asked_per_s": ("asked_pages", "looked_up_pages"),
    "hit_per_s": ("matched_pages", "found_pages"),
    "put_bytes_per_s": ("put_bytes",),
    "gone_per_s": ("evicted_pages", "expired_pages", "removed_pages", "damaged_pages"),
    "compacted_bytes_per_s": ("moved_bytes",),
}
"""What is told -> the counts that it is the sum of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """What happened between two looks."""

    seconds: float
    before: Mapping[str, Any]
    now: Mapping[str, Any]

    def namespaces(self) -> Iterator[dict[str, Any]]:
        """Figures and rates of each."""
        for name, figures in self.now["namespaces"].items():
            counts, old = figures["counts"], self.before["namespaces"].get(name, {}).get("counts", {})
            told: dict[str, Any] = {"namespace": name, "is_owned": figures["is_owned"]}
            told |= {key: figures[key] for key in ("pages", "live_bytes", "live_bytes_max", "disk_bytes", "leases")}
            for rate, names in _RATES.items():
                told[rate] = sum(self._grown(counts[each], old.get(each, 0)) for each in names)
            told["stored_per_s"] = self._grown(counts["puts"].get("stored", 0), old.get("puts", {}).get("stored", 0))
            stops, stopped = counts["stops"], old.get("stops", {})
            grown = {reason: self._grown(count, stopped.get(reason, 0)) for reason, count in stops.items()}
            told["stops"] = {reason: each for reason, each in grown.items() if each}
            yield told

    def requests(self) -> Iterator[dict[str, Any]]:
        """Each kind of which there was any."""
        from emberfs.histogram import Histogram
        from emberkv.metrics import histogram_of

        for kind, each in self.now["requests"].items():
            old = self.before["requests"].get(kind)
            seconds = histogram_of(each["seconds"]).since(histogram_of(old["seconds"]) if old else Histogram())
            if seconds.count:
                errors = sum(each["errors"].values()) - sum(old["errors"].values() if old else ())
                yield {
                    "request": kind, "per_s": seconds.count / self.seconds, "p50_s": seconds.quantile_s(0.5),
                    "p99_s": seconds.quantile_s(0.99), "max_s": seconds.max_s, "errors_per_s": errors / self.seconds,
                }  # fmt: skip

    def _grown(self, now: float, before: float) -> float:
        """A second. A service that began anew counts from 0."""
        return (now - before if now >= before else now) / self.seconds


@click.command()
@click.option("--interval", "interval_s", type=click.FloatRange(0.05, 3600), default=1.0, show_default=True,
              help="Seconds.")  # fmt: skip
@click.option("--count", type=click.IntRange(1), help="End after so many intervals.  [default: go on until Ctrl-C]")
@address_option
@token_option
@tls_option
@json_option
def top(interval_s: float, count: int | None, address: str, token: str, tls: Path | None, as_json: bool) -> None:
    """Show what a service does, live: pages that hit, are stored and go, why matches end, and how long requests take.

    Times are those of the service, without the way there and back.

    \b
    Examples:
      emberline kv top --address 127.0.0.1:7400
      emberline kv top --count 1 --json | jq .asked_per_s
    """
    with operator_of(address, token, tls) as operator:
        intervals = _intervals(operator, interval_s, count)
        if as_json:
            for each in intervals:
                for row in (*each.namespaces(), *each.requests()):
                    print_json({"time_s": each.now["wall_s"], **row})
                sys.stdout.flush()
        elif sys.stdout.isatty():
            _show_live(intervals)
        else:
            for each in intervals:
                for table in tables(each):
                    print_columns(table, right=range(1, len(table[0])))
                    print_line("")
                sys.stdout.flush()


def _intervals(operator: Operator, interval_s: float, count: int | None) -> Iterator[Interval]:
    before, before_s = _look(operator), time.monotonic()
    for number in itertools.count(1):
        time.sleep(interval_s)
        now, now_s = _look(operator), time.monotonic()
        yield Interval(seconds=now_s - before_s, before=before, now=now)
        before, before_s = now, now_s
        if number == count:
            return


def _look(operator: Operator) -> dict[str, Any]:
    found = operator.stat()
    if "requests" not in found:
        raise click.ClickException("this takes a token of an operator")
    return found


def tables(interval: Interval) -> list[list[list[str]]]:
    """Of namespaces, of why matches ended, of requests: each with its heading; empty ones are left out."""
    spaces = [
        ["namespace", "asked/s", "hit", "stored/s", "bytes/s", "gone/s", "moved/s", "pages", "live", "of", "leases"]
    ]
    ends = [["matches end", "per s"]]
    for row in interval.namespaces():
        rate = f"{row['hit_per_s'] / row['asked_per_s']:.1%}" if row["asked_per_s"] else "-"
        spaces.append([
            row["namespace"] if row["is_owned"] else f"{row['namespace']} (lost)", f"{row['asked_per_s']:,.0f}", rate,
            f"{row['stored_per_s']:,.0f}", human_bytes(row["put_bytes_per_s"]), f"{row['gone_per_s']:,.0f}",
            human_bytes(row["compacted_bytes_per_s"]), f"{row['pages']:,}", human_bytes(row["live_bytes"]),
            human_bytes(row["live_bytes_max"]), f"{row['leases']:,}",
        ])  # fmt: skip
        ranked = sorted(row["stops"].items(), key=lambda stop: -stop[1])
        ends += [[f"{row['namespace']}: {reason}", f"{each:,.1f}"] for reason, each in ranked]
    asked = [["request", "per s", "p50", "p99", "max", "errors/s"]]
    for row in interval.requests():
        times = [human_seconds(row[key]) for key in ("p50_s", "p99_s", "max_s")]
        asked.append([row["request"], f"{row['per_s']:,.1f}", *times, f"{row['errors_per_s']:,.1f}"])
    return [spaces, *(table for table in (ends, asked) if len(table) > 1)]


def _show_live(intervals: Iterator[Interval]) -> None:
    from rich.console import Group
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    def drawn(rows: Sequence[Sequence[str]]) -> Table:
        table = Table(box=None, pad_edge=False)
        for number, title in enumerate(rows[0]):
            table.add_column(title, justify="right" if number else "left", no_wrap=True)
        for row in rows[1:]:
            table.add_row(*(Text(safe(cell, terminal=True)) for cell in row))
        return table

    with Live(Text("looking ...")) as live:
        for each in intervals:
            parts = [part for rows in tables(each) for part in (drawn(rows), Text(""))]
            live.update(Group(*parts), refresh=True)
