"""What the aligned read makes of the bytes that another method reads: its sweep, interpolated at that method's bytes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from .scores import Score

COMPARED = ("kl_mean", "kl_p99", "attention_error", "attention_p99")
"""Metrics that are interpolated; all are positive, so their logarithms are."""


@dataclass(frozen=True)
class EqualBytes:
    """A method and the aligned read at the same bytes.

    Attributes:
        method: name of the other method.
        context: tokens in the cache before the first position.
        bytes: bytes that it reads, over the cache's own.
        aligned_bytes: bytes at which the aligned read was evaluated: the same, or the nearest end of the sweep.
        interpolated: whether ``bytes`` lies within the sweep.
        other, aligned: values of :data:`COMPARED`.
    """

    method: str
    context: int
    bytes: float
    aligned_bytes: float
    interpolated: bool
    other: dict[str, float]
    aligned: dict[str, float]


def at_equal_bytes(scores: Sequence[Score], methods: Sequence[str]) -> tuple[EqualBytes, ...]:
    """One entry per context and method of ``methods``, in the order of ``scores``."""
    return tuple(_entry(other, scores) for other in scores if other.method in methods)


def _entry(other: Score, scores: Sequence[Score]) -> EqualBytes:
    sweep = sorted((s for s in scores if s.tolerance and s.context == other.context), key=lambda s: s.bytes)
    bytes_read = min(max(other.bytes, sweep[0].bytes), sweep[-1].bytes)
    return EqualBytes(
        method=other.method,
        context=other.context,
        bytes=other.bytes,
        aligned_bytes=bytes_read,
        interpolated=bytes_read == other.bytes,
        other={name: getattr(other, name) for name in COMPARED},
        aligned={name: _interpolate(sweep, bytes_read, name) for name in COMPARED},
    )


def _interpolate(sweep: Sequence[Score], bytes_read: float, metric: str) -> float:
    """The metric at ``bytes_read``, its logarithm linear in the bytes between two points of the sweep."""
    for low, high in itertools.pairwise(sweep):
        if low.bytes <= bytes_read <= high.bytes and high.bytes > low.bytes:
            share = (bytes_read - low.bytes) / (high.bytes - low.bytes)
            ends = (max(float(getattr(s, metric)), 1e-30) for s in (low, high))
            left, right = (math.log(end) for end in ends)
            return math.exp(left + share * (right - left))
    nearest = min(sweep, key=lambda s: abs(s.bytes - bytes_read))
    return float(getattr(nearest, metric))
