"""The Prometheus page of a KV-cache service, made of its figures when it is asked for.

Names begin with `emberline_kv_`, the unit is at the end, and most have the label `namespace`. Counters begin with the
process; a namespace that is lost keeps its own.

Invariant: a label's values are bounded: namespaces, reasons, states and kinds of requests are few, and of tenants the
largest ones are told only.

Does not know: the service, or how its figures are come by without a race.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
from emberfs.histogram import Histogram
from emberfs.server.metrics import buckets
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from .figures import Figures

TENANTS_MAX = 100
"""Of each namespace."""

_GAUGES = {
    "pages": ("pages", "Pages that the index names, of all kinds together counted once."),
    "orphan_pages": ("orphans", "Pages that nobody finds, because their parent is not there yet."),
    "pinned_pages": ("pinned_pages", "Pages that somebody pinned."),
    "live_bytes": ("live_bytes", "Pages and their headers."),
    "pending_bytes": ("pending_bytes", "Places that were handed out and are not committed."),
    "dead_bytes": ("dead_bytes", "On disk, and not given back yet."),
    "disk_bytes": ("disk_bytes", "Of the segments; replicas apart."),
    "capacity_bytes": ("capacity_bytes", "What segments may take."),
    "limit_bytes": ("limit_bytes", "What of it the store has room for now: less than the capacity where it fills up."),
    "live_bytes_max": ("live_bytes_max", "Live pages beyond it are evicted."),
    "leases": ("leases", "Leases that have not ended."),
    "reservations": ("reservations", "Puts that have not ended."),
    "owned": ("is_owned", "1: this process serves the namespace."),
    "read_only": ("is_read_only", "1: the store does not take the index, so no pages are taken."),
    "epoch": ("epoch", "How often the namespace was taken over."),
}
"""Name -> (figure of a namespace, what it is)."""

_COUNTERS = {
    "matches": ("matches", "Chains that were matched."),
    "asked_pages": ("asked_pages", "Pages that matches asked for."),
    "hit_pages": ("matched_pages", "Pages that matches found."),
    "looked_up_pages": ("looked_up_pages", "Pages that were asked for each for itself."),
    "found_pages": ("found_pages", "Those of them that were there."),
    "put_bytes": ("put_bytes", "Payloads that were stored."),
    "partings": ("partings", "Matches that were told where states are worth keeping."),
    "unleased_hits": ("unleased_hits", "Hits without a lease, since their tenant has too many."),
    "damaged_pages": ("damaged_pages", "Pages that a reader found damaged."),
    "compacted_bytes": ("moved_bytes", "Pages that compaction wrote again."),
    "freed_bytes": ("freed_bytes", "Segments that were given back."),
    "removed_segments": ("removed_segments", "Segments that were given back."),
}
"""Name -> (count of a namespace, what it is)."""

_BY_LABEL = {
    "match_ends": ("stops", "reason", "Matches by why they were no longer; whole: they were all."),
    "lookup_misses": ("misses", "reason", "Pages looked up that were not there, by why."),
    "put_pages": ("puts", "outcome", "Pages that were put, by what became of them."),
}
"""Name -> (count of a namespace by label, label, what it is)."""


class KvCollector(Collector):
    """What a service does, as Prometheus has it. `look` may be called from any thread."""

    def __init__(self, look: Callable[[], Figures]) -> None:
        self._look = look

    def collect(self) -> Iterator[Metric]:
        figures = self._look()
        namespaces = figures["namespaces"]
        yield GaugeMetricFamily("emberline_kv_seats", "Clients of namespaces.", value=figures["seats"])
        yield GaugeMetricFamily(
            "emberline_kv_opening_namespaces", "Namespaces that are being taken over.", value=len(figures["opening"])
        )
        yield from _requests(figures["requests"])
        for name, (key, text) in _GAUGES.items():
            yield _family(GaugeMetricFamily, name, text, {of: each[key] for of, each in namespaces.items()})
        for name, (key, text) in _COUNTERS.items():
            yield _family(CounterMetricFamily, name, text, {of: each["counts"][key] for of, each in namespaces.items()})
        for name, (key, label, text) in _BY_LABEL.items():
            rows = {of: each["counts"][key] for of, each in namespaces.items()}
            yield _labelled(CounterMetricFamily, name, text, label, rows)
        yield _labelled(
            CounterMetricFamily, "gone_pages", "Pages that went, by why.", "cause",
            {of: _gone(each["counts"]) for of, each in namespaces.items()},
        )  # fmt: skip
        yield _labelled(
            GaugeMetricFamily, "segments", "Segments by state.", "state",
            {of: each["segment_states"] for of, each in namespaces.items()},
        )  # fmt: skip
        for name, key, text in (
            ("tenant_bytes", "bytes", "What the largest tenants hold."),
            ("tenant_quota_bytes", "quota_bytes", "What they may hold; 0: as much as there is room for."),
        ):
            rows = {of: _largest(each["tenants"], key) for of, each in namespaces.items()}
            yield _labelled(GaugeMetricFamily, name, text, "tenant", rows)


def _gone(counts: Mapping[str, Any]) -> dict[str, int]:
    return {cause: counts[f"{cause}_pages"] for cause in ("evicted", "expired", "removed", "damaged")}


def _largest(tenants: Mapping[str, Mapping[str, int]], key: str) -> dict[str, int]:
    ranked = sorted(tenants, key=lambda name: -tenants[name]["bytes"])
    return {name: tenants[name][key] for name in ranked[:TENANTS_MAX]}


def _family(kind: type, name: str, text: str, values: Mapping[str, float]) -> Metric:
    family = kind(f"emberline_kv_{name}", text, labels=["namespace"])
    for of, value in values.items():
        family.add_metric([of], value)
    return family  # type: ignore[no-any-return]


def _labelled(kind: type, name: str, text: str, label: str, rows: Mapping[str, Mapping[str, float]]) -> Metric:
    family = kind(f"emberline_kv_{name}", text, labels=["namespace", label])
    for of, values in rows.items():
        for value_of, value in values.items():
            family.add_metric([of, value_of], value)
    return family  # type: ignore[no-any-return]


def _requests(requests: Mapping[str, Mapping[str, Any]]) -> Iterator[Metric]:
    seconds = HistogramMetricFamily(
        "emberline_kv_request_seconds", "Time to serve a request, from the start of its handler on.", labels=["request"]
    )
    errors = CounterMetricFamily(
        "emberline_kv_request_errors", "Requests that ended with an error.", labels=["request", "error"]
    )
    for request, each in requests.items():
        seconds.add_metric([request], *buckets(histogram_of(each["seconds"])))
        for error, count in each["errors"].items():
            errors.add_metric([request, error], count)
    yield seconds
    yield errors


def histogram_of(figures: Any) -> Histogram:
    """Of a kind of request, back from its figures."""
    return msgspec.convert(figures, Histogram, strict=False)
