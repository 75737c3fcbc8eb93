"""From which context on, and up to how many bytes, the aligned read is worth taking, by times of both at some contexts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..break_even import LEAST_CONTEXT, NEVER

FARTHEST = 4
"""How many times beyond the longest measured context a trend is believed."""

DEGREE = 2
"""Of the polynomial that log(ratio) is taken to be over log(context), where there are more contexts than it has coefficients: a
context at which the machine was busy does not decide alone."""

TREND_POINTS = 3
"""How many of the longest contexts a trend is taken from."""

MARGIN = 1.15
"""Ratio from which on a head should read every bit. Times are no more exact than that, and a head that does so in vain loses as
much as one that ought to."""

NEAR = 0.1
"""Difference of a ratio from :data:`MARGIN` at which a layer counts a quarter as much as one that has it."""


@dataclass(frozen=True)
class Timing:
    """Times of both reads at one context.

    Attributes:
        context: live rows.
        aligned_ms, stream_ms: medians.
        ratio: median over rounds of aligned over stream; below 1 the aligned read is the faster.
        layers: for layers that need few, as many and many more bytes, the share of the cache's bytes that the aligned read
            took, and the ratio.
    """

    context: int
    aligned_ms: float
    stream_ms: float
    ratio: float
    layers: tuple[tuple[float, float], ...] = ()


def least_context(timings: Sequence[Timing]) -> int:
    """Rows from which on the aligned read is the faster one, at every longer measured context too.

    Ratios are those of the least squares polynomial of :data:`DEGREE`. Between two contexts log(ratio) is taken to be a line
    over log(context). Where the stream still wins at the longest one, the least squares line through the last
    :data:`TREND_POINTS` is followed, :data:`FARTHEST` times as far at most.

    Args:
        timings: by increasing context; not empty.

    Returns:
        A number of rows, at least :data:`~alignedkv_compile.break_even.LEAST_CONTEXT`;
        :data:`~alignedkv_compile.break_even.NEVER` where no trend leads to a gain.
    """
    points = _smooth([(math.log(each.context), math.log(each.ratio)) for each in timings])
    if points[-1][1] >= 0:
        return _by_trend(points[-TREND_POINTS:])
    for (x0, y0), (x1, y1) in reversed(list(itertools.pairwise(points))):
        if y0 >= 0:
            return _rows(x0 + (x1 - x0) * y0 / (y0 - y1))
    return _rows(points[0][0])


def break_even(timings: Sequence[Timing]) -> float:
    """The share of the cache's bytes up to which an aligned read takes no more than :data:`MARGIN` times as long as the stream:
    where the weighted least squares line through the ratios of all layers, over their shares, has that ratio.

    Contexts need not be told apart: below the crossover no head is read at few bits anyway, and from there on a call's own work
    matters less than what it reads.

    Returns:
        At most 1; 0 where times do not grow with the bytes, or no share is small enough, as where :func:`least_context` is
        never reached.
    """
    points = [(share, ratio - MARGIN) for timing in timings for share, ratio in timing.layers]
    weights = [(NEAR + abs(y)) ** -2 for _, y in points]
    total = math.fsum(weights)
    if not total:
        return 0.0
    mean_x, mean_y = (_product(weights, values) / total for values in zip(*points, strict=True))
    spread = math.fsum(weight * (x - mean_x) ** 2 for weight, (x, _) in zip(weights, points, strict=True))
    slope = math.fsum(weight * (x - mean_x) * (y - mean_y) for weight, (x, y) in zip(weights, points, strict=True))
    return min(max(mean_x - mean_y * spread / slope, 0.0), 1.0) if slope > 0 else 0.0


def _smooth(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """The points on the least squares polynomial, which is summed up from orthogonal ones."""
    if len(points) <= DEGREE + 1:
        return points
    mean = math.fsum(x for x, _ in points) / len(points)
    polynomials: list[list[float]] = []
    fitted = [0.0] * len(points)
    for degree in range(DEGREE + 1):
        values = [(x - mean) ** degree for x, _ in points]
        for lower in polynomials:
            share = _product(values, lower) / _product(lower, lower)
            values = [value - share * other for value, other in zip(values, lower, strict=True)]
        polynomials.append(values)
        share = _product(values, [y for _, y in points]) / _product(values, values)
        fitted = [before + share * value for before, value in zip(fitted, values, strict=True)]
    return [(x, y) for (x, _), y in zip(points, fitted, strict=True)]


def _product(left: Sequence[float], right: Sequence[float]) -> float:
    return math.fsum(a * b for a, b in zip(left, right, strict=True))


def _by_trend(points: Sequence[tuple[float, float]]) -> int:
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    if slope >= 0:
        return NEVER
    crossing = mean_x - mean_y / slope
    if crossing > points[-1][0] + math.log(FARTHEST):
        return NEVER
    return _rows(max(crossing, points[-1][0]))


def _rows(log_context: float) -> int:
    return max(LEAST_CONTEXT, math.ceil(math.exp(log_context)))
