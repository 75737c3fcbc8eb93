"""The metrics through OpenTelemetry: observable instruments that read what Prometheus' collector reads, when a reader asks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence

from ..call_times import CALL_TIMES, TimedGraph
from . import names
from .errors import MetricsClientError
from .names import Kind, Metric
from .read import Sample, read_samples

try:
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation, get_meter_provider
except ImportError as error:
    raise MetricsClientError("opentelemetry") from error

SAME_COLLECTION_SECONDS = 0.5
"""A reader asks one instrument after the other; so long they are answered from one reading."""


class _Reading:
    """The samples, read once for all instruments of a collection."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._samples: Sequence[Sample] = ()
        self._until = 0.0

    def of(self, metric: Metric) -> list[Sample]:
        with self._lock:
            if time.monotonic() >= self._until:
                self._samples = read_samples()
                self._until = time.monotonic() + SAME_COLLECTION_SECONDS
            return [sample for sample in self._samples if sample.metric is metric]


class Instrumentation:
    """The instruments of one meter.

    Args:
        provider: whose meter they are made with.
    """

    def __init__(self, provider: MeterProvider) -> None:
        meter = provider.get_meter("alignedkv_compile")
        reading = _Reading()
        for metric in names.READ_AT_SCRAPE:
            create = meter.create_observable_counter if metric.kind is Kind.COUNTER else meter.create_observable_gauge
            create(instrument_name(metric), [_callback(metric, reading)], description=metric.meaning)
        metric = names.CALL_SECONDS
        self._histogram = meter.create_histogram(
            instrument_name(metric),
            unit="s",
            description=metric.meaning,
            explicit_bucket_boundaries_advisory=names.CALL_BUCKETS,
        )
        CALL_TIMES.add(self._observe)

    def close(self) -> None:
        """Time no more calls."""
        CALL_TIMES.remove(self._observe)

    def _observe(self, graph: TimedGraph, seconds: float) -> None:
        self._histogram.record(seconds, {"graph": graph.graph, "phase": graph.phase})


def _callback(metric: Metric, reading: _Reading) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def observe(_options: CallbackOptions) -> Iterable[Observation]:
        return [Observation(one.value, dict(zip(metric.labels, one.labels, strict=True))) for one in reading.of(metric)]

    return observe


def instrument_name(metric: Metric) -> str:
    """OpenTelemetry's exporters to Prometheus add ``_total`` themselves."""
    return metric.name.removesuffix("_total")


def add_instruments(provider: MeterProvider | None) -> Instrumentation:
    """See :func:`alignedkv_compile.metrics.instrument`."""
    return Instrumentation(get_meter_provider() if provider is None else provider)
