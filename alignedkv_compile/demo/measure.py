"""Timing: every variant decodes the same tokens, in turns, in one process; what was read and is held, between calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import LayerStatistics, reset_stats, stats
from .held import held_bytes
from .variants import ALIGNED, COMPILED, EAGER, Variant

STOCK = (EAGER, COMPILED)
"""Variants that a user has without this package."""
BURST = 4
"""Tokens that a variant decodes before it is the next one's turn."""
WARM_UP = 2
"""Tokens after the first that are not timed: a DynamicCache may recompile there, for a symbolic length."""


@dataclass(frozen=True)
class Timing:
    """One variant at one context and cache class.

    Attributes:
        variant: name of the variant.
        cache: "static" or "dynamic".
        context: tokens in the cache before the first decode.
        first_token_s: the first call, compilation and building of planes included.
        warm_up_s: the untimed calls that followed.
        token_ms: each timed call, in the order made.
        held_bytes: of the cache after each timed call, with all that stands beside it (:func:`.held.held_bytes`).
    """

    variant: str
    cache: str
    context: int
    first_token_s: float
    warm_up_s: tuple[float, ...]
    token_ms: tuple[float, ...]
    held_bytes: tuple[int, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.token_ms)

    @property
    def tokens_per_second(self) -> float:
        return 1000.0 / self.median_ms


@dataclass(frozen=True)
class BytesRead:
    """What the aligned read took from the caches while it was timed.

    Attributes:
        read_by_step: bytes of cache and planes that each timed call read in each layer, ``[calls][layers]``.
        full_by_step: what reading every live row in the cache's dtype would have taken, likewise.
    """

    read_by_step: tuple[tuple[int, ...], ...]
    full_by_step: tuple[tuple[int, ...], ...]

    @property
    def bytes_read(self) -> int:
        """Of all calls and layers."""
        return sum(map(sum, self.read_by_step))

    @property
    def bytes_full(self) -> int:
        """Of all calls and layers."""
        return sum(map(sum, self.full_by_step))

    @property
    def fraction(self) -> float:
        return self.bytes_read / self.bytes_full if self.bytes_full else float("nan")


@dataclass(frozen=True)
class Comparison:
    """All variants at one context and cache class, measured in turns."""

    cache: str
    context: int
    timings: tuple[Timing, ...]
    bytes: BytesRead | None

    def of(self, variant: str) -> Timing:
        """The timing of a variant, by name."""
        return next(timing for timing in self.timings if timing.variant == variant)

    def speedup(self, variant: str, baseline: str) -> float:
        """How many times faster ``variant`` is than ``baseline``, by median."""
        return self.of(baseline).median_ms / self.of(variant).median_ms

    @property
    def best_stock(self) -> str:
        """Name of the fastest variant that is not this backend, by median."""
        return min((timing for timing in self.timings if timing.variant in STOCK), key=lambda timing: timing.median_ms).variant


def calls_per_comparison(tokens: int) -> int:
    """Rows that :func:`compare` appends to each cache."""
    return 1 + WARM_UP + tokens


def compare(
    variants: Sequence[Variant],
    make_cache: Callable[[], Any],
    kind: str,
    context: int,
    following: torch.Tensor,
    tokens: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Comparison:
    """Time ``tokens`` decode steps of every variant, in turns of :data:`BURST`, starting with a different one each round.

    Args:
        variants: what to compare.
        make_cache: gives each variant a cache of its own with ``context`` tokens.
        kind: "static" or "dynamic", for the record.
        context: tokens in a new cache.
        following: int64 ``[1, M]``, the document's next tokens, ``M >= calls_per_comparison(tokens)``.
        tokens: timed steps per variant.
        advance: called with the number of calls that each step has done.
    """
    caches = {variant.name: make_cache() for variant in variants}
    opening: dict[str, list[float]] = {}
    for variant in variants:
        with variant.compiling():
            opening[variant.name] = [_timed(variant, following, row, caches[variant.name]) for row in range(1 + WARM_UP)]
        advance(1 + WARM_UP)
    timed: dict[str, list[float]] = {variant.name: [] for variant in variants}
    held: dict[str, list[int]] = {variant.name: [] for variant in variants}
    layers: list[tuple[LayerStatistics, ...]] = []
    for round_, start in enumerate(range(0, tokens, BURST)):
        for turn in range(len(variants)):
            variant = variants[(round_ + turn) % len(variants)]
            rows = range(1 + WARM_UP + start, 1 + WARM_UP + min(start + BURST, tokens))
            for row in rows:
                if variant.name == ALIGNED:
                    reset_stats()
                timed[variant.name].append(1000 * _timed(variant, following, row, caches[variant.name]))
                held[variant.name].append(held_bytes(caches[variant.name]))
                if variant.name == ALIGNED:
                    layers.append(stats().layers)
            advance(len(rows))
    timings = tuple(
        Timing(
            variant.name,
            kind,
            context,
            opening[variant.name][0],
            tuple(opening[variant.name][1:]),
            tuple(timed[variant.name]),
            tuple(held[variant.name]),
        )
        for variant in variants
    )
    return Comparison(kind, context, timings, _bytes_read(layers) if layers else None)


def _bytes_read(steps: Sequence[Sequence[LayerStatistics]]) -> BytesRead:
    """Statistics of ``[calls][layers]``; a graph that the call did not run has counted nothing and is no layer of it."""
    called = [[layer for layer in layers if layer.calls] for layers in steps]
    return BytesRead(
        tuple(tuple(layer.bytes_read for layer in layers) for layers in called),
        tuple(tuple(layer.bytes_full for layer in layers) for layers in called),
    )


def _timed(variant: Variant, following: torch.Tensor, row: int, cache: Any) -> float:
    token = following[:, row : row + 1]
    start = time.perf_counter()
    variant.decode(token, cache)
    return time.perf_counter() - start
