"""Reading all numbers, now: from the reports, the counters and the caches of this process, into :class:`Sample` records.

This knows no client library. It runs in the thread of whoever scrapes; on a GPU it waits for the device there, while the
thread that decodes waits for nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from ..contract import Outcome
from ..counter_ledger import GraphKey
from ..ops import COUNTER_FIELDS
from ..reasons import Reason
from ..report import GraphReport, report
from ..shadow import SHADOW_LOG, ShadowRecord
from ..state.usage import CacheUsage, cache_usage
from ..statistics import certificate_ratios, counter_totals
from . import names
from .names import Metric
from .stream_reasons import STREAM_REASONS, reason_label

_ROWS = {
    "key_rows_mid": ("key", "8"),
    "key_rows_full": ("key", "full"),
    "value_rows_hi": ("value", "4"),
    "value_rows_mid": ("value", "8"),
    "value_rows_full": ("value", "full"),
}
"""Counter -> labels ``tensor`` and ``precision`` of :data:`.names.ROWS`."""
_BY_LAYER = {names.CALLS: "calls", names.READ_BYTES: "bytes_read", names.FULL_BYTES: "bytes_full", names.LIVE_ROWS: "rows"}


@dataclass(frozen=True)
class Sample:
    """One number.

    Attributes:
        metric: which.
        labels: values of its labels, in their order.
        value: the number.
    """

    metric: Metric
    labels: tuple[str, ...]
    value: float


def read_samples() -> list[Sample]:
    """Everything of :data:`.names.READ_AT_SCRAPE`; metrics of which nothing is known have no sample."""
    return [
        Sample(names.INFO, (_version(), torch.__version__), 1),
        *_usage(list(cache_usage())),
        *_compiled(report().graphs),
        *_counted(counter_totals()),
        *_certified(certificate_ratios()),
        *_shadow(SHADOW_LOG.records()),
    ]


def _version() -> str:
    try:
        return version("alignedkv-compile")
    except PackageNotFoundError:  # a source tree that was never installed
        return "unknown"


def _usage(records: Iterable[CacheUsage]) -> Iterator[Sample]:
    kinds: dict[str, list[CacheUsage]] = {}
    for record in records:
        kinds.setdefault(record.kind, []).append(record)
    counted: set[int] = set()
    for kind, members in sorted(kinds.items()):
        owners = [one for one in members if one.address not in counted]
        counted.update(one.address for one in owners)
        known = [one for one in members if one.rows is not None]
        rows, capacity = sum(one.rows or 0 for one in known), sum(one.capacity for one in known)
        yield Sample(names.CACHES, (kind,), len(members))
        yield Sample(names.CACHE_BYTES, (kind,), sum(one.cache_bytes for one in owners))
        yield Sample(names.PLANE_BYTES, (kind,), sum(one.plane_bytes for one in members))
        yield Sample(names.COPY_BYTES, (kind,), sum(one.copy_bytes for one in members))
        yield Sample(names.CACHE_ROWS, (kind,), rows)
        yield Sample(names.CACHE_CAPACITY, (kind,), capacity)
        if capacity:
            yield Sample(names.CACHE_UTILISATION, (kind,), rows / capacity)


def _compiled(graphs: tuple[GraphReport, ...]) -> Iterator[Sample]:
    compilations = Counter((graph.function, _outcome(graph)) for graph in graphs)
    yield from (Sample(names.COMPILATIONS, key, count) for key, count in sorted(compilations.items()))
    sites = [site for graph in graphs for site in graph.sites]
    for outcome in Outcome:
        yield Sample(names.SITES, (outcome.value,), sum(site.outcome is outcome for site in sites))
    for reason in Reason:
        yield Sample(names.DECLINED_SITES, (reason.value,), sum(site.kind is reason for site in sites))
    streamed = Counter(dict.fromkeys(STREAM_REASONS, 0))
    for graph in graphs:
        for note, times in graph.notes.items():
            streamed[reason_label(note)] += times
    yield from (Sample(names.STREAMED_CALLS, (reason,), times) for reason, times in sorted(streamed.items()))


def _outcome(graph: GraphReport) -> str:
    if graph.fallback:
        return "fallback"
    touched = any(site.outcome is not Outcome.DECLINED for site in graph.sites)
    return "rewritten" if touched else "unchanged"


def _counted(totals: Mapping[GraphKey, list[list[int]]]) -> Iterator[Sample]:
    for key, sites in totals.items():
        layers = [dict(zip(COUNTER_FIELDS, row, strict=True)) for row in sites]
        for metric, name in _BY_LAYER.items():
            yield from (Sample(metric, (str(key), str(index)), counts[name]) for index, counts in enumerate(layers))
        for name, (tensor, precision) in _ROWS.items():
            yield Sample(names.ROWS, (str(key), tensor, precision), sum(counts[name] for counts in layers))


def _certified(ratios: Mapping[GraphKey, list[float]]) -> Iterator[Sample]:
    for key, sites in ratios.items():
        yield from (Sample(names.CERTIFICATE, (str(key), str(index)), ratio) for index, ratio in enumerate(sites))


def _shadow(records: Mapping[GraphKey, ShadowRecord]) -> Iterator[Sample]:
    for key, record in records.items():
        yield Sample(names.SHADOW_CHECKS, (str(key),), record.checks)
        by_layer: dict[Metric, Mapping[int, float]] = {
            names.SHADOW_EXCEEDED: record.exceeded,
            names.SHADOW_ERROR: record.last,
            names.SHADOW_WORST: record.worst,
        }
        for metric, layers in by_layer.items():
            yield from (Sample(metric, (str(key), str(layer)), value) for layer, value in sorted(layers.items()))
