"""What the screen shows, computed from one scrape, or from two for what happened in between."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..metrics import names
from .scrape import Scrape

QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class CacheLine:
    """One kind of cache: pairs of K and V, memory, live rows over those there is room for (None when not known)."""

    kind: str
    pairs: int
    cache_bytes: float
    plane_bytes: float
    copy_bytes: float
    utilisation: float | None


@dataclass(frozen=True)
class LatencyLine:
    """Calls of one graph: how many, how many per second (None with one scrape), quantiles in seconds by :data:`QUANTILES`."""

    graph: str
    phase: str
    calls: int
    rate: float | None
    quantiles: tuple[float, ...]


@dataclass(frozen=True)
class LayerLine:
    """One layer: bytes read and full, the largest certificate and shadow error over the tolerance (None when not known)."""

    graph: str
    layer: int
    read: float
    full: float
    certificate: float | None
    shadow: float | None

    @property
    def fraction(self) -> float | None:
        """Bytes read over full; None when nothing was read."""
        return self.read / self.full if self.full else None


@dataclass(frozen=True)
class View:
    """Everything on the screen.

    Attributes:
        version: of the backend.
        resident_bytes: of the process, None when the endpoint does not say.
        caches, latencies, layers: the tables.
        sites: attention calls by state.
        streamed: calls of a layer that read every bit, by reason.
        compilations: graphs compiled so far.
        seconds: length of the time that counts are about; None for the whole life of the process.
    """

    version: str
    resident_bytes: float | None
    caches: tuple[CacheLine, ...]
    latencies: tuple[LatencyLine, ...]
    layers: tuple[LayerLine, ...]
    sites: Mapping[str, int]
    streamed: Mapping[str, int]
    compilations: int
    seconds: float | None

    @property
    def read(self) -> float:
        """Bytes read, over all layers."""
        return sum(layer.read for layer in self.layers)

    @property
    def full(self) -> float:
        """Bytes that streaming would have read, over all layers."""
        return sum(layer.full for layer in self.layers)


def view(now: Scrape, before: Scrape | None = None) -> View:
    """What to show of a scrape; counts are those since ``before``, or since the process began."""
    delta = now.since(before)
    seconds = None if before is None else max(now.seconds - before.seconds, 1e-9)
    versions = [labels["version"] for labels, _ in now.series(names.INFO.name)]
    resident = [value for _, value in now.series("process_resident_memory_bytes")]
    streamed = {reason: int(count) for reason, count in delta.by(names.STREAMED_CALLS, "reason").items() if count}
    return View(
        version=versions[0] if versions else "unknown",
        resident_bytes=resident[0] if resident else None,
        caches=_caches(now),
        latencies=_latencies(delta, seconds),
        layers=_layers(delta, now),
        sites={state: int(count) for state, count in now.by(names.SITES, "state").items()},
        streamed=streamed,
        compilations=int(now.total(names.COMPILATIONS)),
        seconds=seconds,
    )


def _caches(now: Scrape) -> tuple[CacheLine, ...]:
    utilisation = now.by(names.CACHE_UTILISATION, "kind")
    cache, planes, copies = (now.by(one, "kind") for one in (names.CACHE_BYTES, names.PLANE_BYTES, names.COPY_BYTES))
    return tuple(
        CacheLine(kind, int(pairs), cache[kind], planes[kind], copies[kind], utilisation.get(kind))
        for kind, pairs in sorted(now.by(names.CACHES, "kind").items())
    )


def _latencies(delta: Scrape, seconds: float | None) -> tuple[LatencyLine, ...]:
    buckets: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for labels, count in delta.series(f"{names.CALL_SECONDS.name}_bucket"):
        buckets.setdefault((labels["graph"], labels["phase"]), []).append((float(labels["le"]), count))
    lines = []
    for (graph, phase), found in sorted(buckets.items()):
        calls = int(max(count for _, count in found))
        quantiles = tuple(quantile(share, found) for share in QUANTILES)
        lines.append(LatencyLine(graph, phase, calls, None if seconds is None else calls / seconds, quantiles))
    return tuple(lines)


def quantile(share: float, buckets: Sequence[tuple[float, float]]) -> float:
    """A quantile of a histogram as Prometheus' ``histogram_quantile`` estimates it: linear inside a bucket.

    Args:
        share: between 0 and 1.
        buckets: upper bounds and cumulated counts; the last bound is infinite.

    Returns:
        The estimate; the last finite bound where it lies beyond, NaN without observations.
    """
    buckets = sorted(buckets)
    wanted = share * buckets[-1][1]
    if buckets[-1][1] == 0:
        return math.nan
    low, below = 0.0, 0.0
    for bound, count in buckets:
        if count >= wanted and count > below:
            return low if math.isinf(bound) else low + (bound - low) * (wanted - below) / (count - below)
        low, below = bound, count
    return low


def _layers(delta: Scrape, now: Scrape) -> tuple[LayerLine, ...]:
    read, full = (_by_layer(delta, one.name) for one in (names.READ_BYTES, names.FULL_BYTES))
    certificates, shadow = (_by_layer(now, one.name) for one in (names.CERTIFICATE, names.SHADOW_WORST))
    return tuple(
        LayerLine(*key, read.get(key, 0.0), full.get(key, 0.0), certificates.get(key), shadow.get(key))
        for key in sorted({*read, *shadow})
    )


def _by_layer(values: Scrape, name: str) -> dict[tuple[str, int], float]:
    return {(labels["graph"], int(labels["layer"])): value for labels, value in values.series(name)}
