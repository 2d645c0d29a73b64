"""The Prometheus page of a server: what it serves, how long that takes, and what it holds.

Counting costs two clock reads a request. Gauges are read when the page is asked for, from functions handed in.
Names begin with `emberline_`; the unit is at the end, as Prometheus has it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from ..messages import Message
from ..runtime import Runtime
from ..transport.types import Service

LATENCY_BUCKETS_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)

Gauges = Callable[[], Mapping[str, float | Mapping[str, float]]]
"""Name -> value, or name -> {label: value}."""


class Metered:
    """A service that counts what passes through it."""

    def __init__(self, service: Service, runtime: Runtime, registry: CollectorRegistry) -> None:
        self._service = service
        self._runtime = runtime
        self._seconds = Histogram(
            "emberline_request_seconds",
            "Time to serve a request.",
            ["request"],
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._errors = Counter(
            "emberline_request_errors", "Requests that ended with an error.", ["request", "error"], registry=registry
        )
        self._bytes = Counter(
            "emberline_payload_bytes", "Payload bytes in either direction.", ["request"], registry=registry
        )

    def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Awaitable[Message]:
        """Serve one request."""
        return self._timed(request, buffers)

    async def _timed(self, request: Message, buffers: Sequence[memoryview]) -> Message:
        name = type(request).__name__
        begin_s = self._runtime.now_s()
        try:
            return await self._service.handle(request, buffers)
        except Exception as error:
            self._errors.labels(name, type(error).__name__).inc()
            raise
        finally:
            self._seconds.labels(name).observe(self._runtime.now_s() - begin_s)
            if buffers:
                self._bytes.labels(name).inc(sum(len(buffer) for buffer in buffers))


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


def serve_metrics(registry: CollectorRegistry, gauges: Gauges, address: str) -> Callable[[], None]:
    """Serve the page at http://`address`/metrics from a thread of its own; returns what ends it."""
    registry.register(_GaugeCollector(gauges))
    host, _, port = address.rpartition(":")
    server, thread = start_http_server(int(port), host or "0.0.0.0", registry=registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
