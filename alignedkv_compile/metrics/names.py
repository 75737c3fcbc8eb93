"""Every metric, once: name, kind, labels and meaning. Collectors, rules, board, ``alignedkv top`` and the docs use them.

Names follow Prometheus: a prefix, the unit at the end, ``_total`` for counters. ``graph`` is what a graph was traced from and
its number of attention sites ("LlamaModel/30"), ``layer`` the order of a site in it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Kind(enum.Enum):
    """How a metric behaves."""

    GAUGE = "gauge"
    COUNTER = "counter"
    """Grows until the process ends or somebody calls ``reset_stats()`` or ``reset_report()``."""
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: as Prometheus sees it.
        kind: see :class:`Kind`.
        meaning: one sentence without its full stop.
        labels: names of its labels.
        needs: what it takes to see any, "" for nothing.
    """

    name: str
    kind: Kind
    meaning: str
    labels: tuple[str, ...] = ()
    needs: str = ""


STATS = "stats"
"""Of :attr:`Metric.needs`: the option of this name."""
CERTIFIED = 'stats, guarantee="worst_case"'
SHADOW = "shadow_every"

INFO = Metric("alignedkv_build_info", Kind.GAUGE, "1, with the versions as labels", ("version", "torch"))

CACHES = Metric("alignedkv_caches", Kind.GAUGE, "Pairs of K and V caches, one for each layer of each cache", ("kind",))
CACHE_BYTES = Metric("alignedkv_cache_bytes", Kind.GAUGE, "Memory of K and V, unused room included", ("kind",))
PLANE_BYTES = Metric("alignedkv_plane_bytes", Kind.GAUGE, "Memory of the planes", ("kind",))
COPY_BYTES = Metric("alignedkv_copy_bytes", Kind.GAUGE, "Memory of rows kept once more beside a cache", ("kind",))
CACHE_ROWS = Metric(
    "alignedkv_cache_rows", Kind.GAUGE, "Live rows of one head and batch entry, over all pairs where that is known", ("kind",)
)
CACHE_CAPACITY = Metric("alignedkv_cache_capacity_rows", Kind.GAUGE, "Rows that the same pairs have room for", ("kind",))
CACHE_UTILISATION = Metric("alignedkv_cache_utilisation_ratio", Kind.GAUGE, "Live rows over capacity", ("kind",))

COMPILATIONS = Metric(
    "alignedkv_compilations_total",
    Kind.COUNTER,
    "Graphs compiled, recompiles included: rewritten, unchanged (stock), or fallback (stock, after an internal error)",
    ("function", "outcome"),
)
SITES = Metric("alignedkv_sites", Kind.GAUGE, "Attention calls over a KV cache in all compiled graphs", ("state",))
DECLINED_SITES = Metric("alignedkv_declined_sites", Kind.GAUGE, "Those left to stock attention, by kind of reason", ("reason",))
STREAMED_CALLS = Metric(
    "alignedkv_streamed_calls_total",
    Kind.COUNTER,
    "Calls of a layer that read every bit because its planes were stale",
    ("reason",),
)

CALLS = Metric("alignedkv_calls_total", Kind.COUNTER, "Reads of a layer", ("graph", "layer"), STATS)
READ_BYTES = Metric("alignedkv_read_bytes_total", Kind.COUNTER, "Bytes of KV cache read", ("graph", "layer"), STATS)
FULL_BYTES = Metric(
    "alignedkv_full_bytes_total", Kind.COUNTER, "Bytes that streaming the live rows would have read", ("graph", "layer"), STATS
)
LIVE_ROWS = Metric(
    "alignedkv_live_rows_total",
    Kind.COUNTER,
    "Live rows met by reads, over batch entries and KV heads",
    ("graph", "layer"),
    STATS,
)
ROWS = Metric(
    "alignedkv_rows_total",
    Kind.COUNTER,
    "Rows of which so many bits were read (4 for K is every row of an aligned read and is not counted)",
    ("graph", "tensor", "precision"),
    STATS,
)
CERTIFICATE = Metric(
    "alignedkv_certificate_ratio",
    Kind.GAUGE,
    "Largest certificate so far over the tolerance",
    ("graph", "layer"),
    CERTIFIED,
)

SHADOW_CHECKS = Metric("alignedkv_shadow_checks_total", Kind.COUNTER, "Calls also computed from all bits", ("graph",), SHADOW)
SHADOW_EXCEEDED = Metric(
    "alignedkv_shadow_exceeded_total",
    Kind.COUNTER,
    "Checked reads whose error was above the tolerance",
    ("graph", "layer"),
    SHADOW,
)
SHADOW_ERROR = Metric(
    "alignedkv_shadow_error_ratio", Kind.GAUGE, "Error over tolerance in the last checked call", ("graph", "layer"), SHADOW
)
SHADOW_WORST = Metric(
    "alignedkv_shadow_worst_error_ratio", Kind.GAUGE, "Largest error over tolerance so far", ("graph", "layer"), SHADOW
)

CALL_SECONDS = Metric(
    "alignedkv_call_seconds",
    Kind.HISTOGRAM,
    "Time of a call of a compiled graph: a token's, where decode is one graph",
    ("graph", "phase"),
)
CALL_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Upper bounds of the histogram's buckets, in seconds."""

READ_AT_SCRAPE = (
    INFO,
    CACHES,
    CACHE_BYTES,
    PLANE_BYTES,
    COPY_BYTES,
    CACHE_ROWS,
    CACHE_CAPACITY,
    CACHE_UTILISATION,
    COMPILATIONS,
    SITES,
    DECLINED_SITES,
    STREAMED_CALLS,
    CALLS,
    READ_BYTES,
    FULL_BYTES,
    LIVE_ROWS,
    ROWS,
    CERTIFICATE,
    SHADOW_CHECKS,
    SHADOW_EXCEEDED,
    SHADOW_ERROR,
    SHADOW_WORST,
)
"""All but the histogram."""
METRICS = (*READ_AT_SCRAPE, CALL_SECONDS)
