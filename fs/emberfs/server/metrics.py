"""The Prometheus page of a server: what it serves, how long that takes and why, and what it holds.

Everything is read when the page is asked for: the meter of the network, which counts what is served, and gauges from
functions handed in. Names begin with `emberline_`; the unit is at the end, as Prometheus has it.

Does not know: what a stage is, or which kinds there are (`meter`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ..histogram import Histogram
from ..messages import Message, MeterRead, ReadMeter
from ..meter import STAGES, Meter
from ..transport.types import Service

Gauges = Callable[[], Mapping[str, float | Mapping[str, float]]]
"""Name -> value, or name -> {label: value}."""


class Metered:
    """A service, and the answer to who asks what was served."""

    def __init__(self, service: Service, meter: Meter) -> None:
        self._service = service
        self._meter = meter

    def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Awaitable[Message]:
        """Serve one request."""
        if isinstance(request, ReadMeter):
            return self._read()
        return self._service.handle(request, buffers)

    async def _read(self) -> MeterRead:
        return MeterRead(self._meter.up_s, self._meter.kinds)


class MeterCollector(Collector):
    """What was served, as Prometheus has it."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def collect(self) -> Iterator[Metric]:
        whole = HistogramMetricFamily(
            "emberline_request_seconds", "Time to serve a request, from its arrival on.", labels=["request"]
        )
        stages = HistogramMetricFamily(
            "emberline_request_stage_seconds",
            "Where that time went; requests that were not in a stage are not in its histogram.",
            labels=["request", "stage"],
        )
        errors = CounterMetricFamily(
            "emberline_request_errors", "Requests that ended with an error.", labels=["request", "error"]
        )
        payload = CounterMetricFamily(
            "emberline_payload_bytes", "Payload bytes in either direction.", labels=["request"]
        )
        # A copy: we are in a thread of our own, and kinds come as they are served.
        for kind, stats in list(self._meter.kinds.items()):
            whole.add_metric([kind], *buckets(stats.whole))
            for stage in STAGES:
                stages.add_metric([kind, stage], *buckets(stats.stage(stage)))
            payload.add_metric([kind], stats.payload_bytes)
            for error, count in list(stats.errors.items()):
                errors.add_metric([kind, error], count)
        return iter([whole, stages, errors, payload])


def buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """Rows and sum, as a `HistogramMetricFamily` takes them."""
    histogram = histogram.copy()
    rows = [
        (floatToGoString(end_s), float(count))  # type: ignore[no-untyped-call]
        for end_s, count in histogram.cumulative()
    ]
    return rows, histogram.total_s


class _GaugeCollector(Collector):
    def __init__(self, gauges: Gauges) -> None:
        self._gauges = gauges

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, value in self._gauges().items():
            full = f"emberline_{name}"
            if isinstance(value, Mapping):
                family = GaugeMetricFamily(full, name.replace("_", " "), labels=["of"])
                for label, number in value.items():
                    family.add_metric([label], number)
            else:
                family = GaugeMetricFamily(full, name.replace("_", " "), value=value)
            yield family


def serve_metrics(meter: Meter, gauges: Gauges, address: str) -> Callable[[], None]:
    """Serve the page of a server of the store; see `serve_page`."""
    return serve_page([MeterCollector(meter), _GaugeCollector(gauges)], address)


def serve_page(collectors: Iterable[Collector], address: str) -> Callable[[], None]:
    """Serve what is collected at http://`address`/metrics from a thread of its own; returns what ends it."""
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    host, _, port = address.rpartition(":")
    server, thread = start_http_server(int(port), host or "0.0.0.0", registry=registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
