"""The metrics in a registry of ``prometheus_client``, and a server for them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from types import TracebackType

from ..call_times import CALL_TIMES, TimedGraph
from . import names
from .errors import MetricsAddressError, MetricsClientError
from .names import Kind, Metric
from .read import read_samples

try:
    from prometheus_client import REGISTRY as DEFAULT_REGISTRY
    from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, start_http_server
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.metrics_core import Metric as Family
    from prometheus_client.registry import Collector
except ImportError as error:
    raise MetricsClientError("prometheus_client") from error


class AlignedKVCollector(Collector):
    """Reads the numbers when it is asked for them; the histogram alone is filled by calls."""

    def __init__(self) -> None:
        metric = names.CALL_SECONDS
        self._histogram = Histogram(metric.name, metric.meaning, metric.labels, registry=None, buckets=names.CALL_BUCKETS)

    def observe(self, graph: TimedGraph, seconds: float) -> None:
        """See :data:`alignedkv_compile.call_times.Observer`."""
        self._histogram.labels(graph.graph, graph.phase).observe(seconds)

    def describe(self) -> Iterator[Family]:
        """Names only: what a registry looks at to refuse a second of the same name."""
        yield from map(_family, names.READ_AT_SCRAPE)
        yield from self._histogram.describe()

    def collect(self) -> Iterator[Family]:
        families = {metric: _family(metric) for metric in names.READ_AT_SCRAPE}
        for sample in read_samples():
            families[sample.metric].add_metric(sample.labels, sample.value)
        yield from families.values()
        yield from self._histogram.collect()


def _family(metric: Metric) -> CounterMetricFamily | GaugeMetricFamily:
    family = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
    return family(metric.name, metric.meaning, labels=metric.labels)


class Registration:
    """The metrics in one registry, until :meth:`close`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._collector = AlignedKVCollector()
        registry.register(self._collector)
        CALL_TIMES.add(self._collector.observe)
        self._closed = False

    def close(self) -> None:
        """Take them out; a second time, nothing happens."""
        if not self._closed:
            self._closed = True
            CALL_TIMES.remove(self._collector.observe)
            self._registry.unregister(self._collector)
            _REGISTRATIONS.pop(self._registry, None)


_REGISTRATIONS: weakref.WeakKeyDictionary[CollectorRegistry, Registration] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def add_to(registry: CollectorRegistry | None) -> Registration:
    """See :func:`alignedkv_compile.metrics.register`."""
    registry = DEFAULT_REGISTRY if registry is None else registry
    with _LOCK:
        present = _REGISTRATIONS.get(registry)
        if present is None:
            present = _REGISTRATIONS[registry] = Registration(registry)
    return present


class Server:
    """An HTTP server in a thread of its own; a context manager that ends it.

    Attributes:
        port: where it listens.
        url: what to scrape.
        registry: the metrics of the backend, and of the process (resident memory, processor time).
    """

    def __init__(self, port: int, addr: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._registration = add_to(self.registry)
        try:
            self._server, self._thread = start_http_server(port, addr, self.registry)
        except (OSError, OverflowError) as error:
            self._registration.close()
            raise MetricsAddressError(addr, port, error) from error
        self.port = int(self._server.server_port)
        host = "127.0.0.1" if addr in ("", "0.0.0.0") else f"[{addr}]" if ":" in addr else addr
        self.url = f"http://{host}:{self.port}/metrics"

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._registration.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def serve(port: int, addr: str) -> Server:
    """See :func:`alignedkv_compile.metrics.start`."""
    return Server(port, addr)
