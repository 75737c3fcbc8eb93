"""Latency as a straight line: what a token costs at any context, and what each token of context adds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """``ms = slope * tokens + intercept``.

    Attributes:
        slope: milliseconds that each token of context adds.
        intercept: milliseconds of the rest: weights, launches, the interpreter.
    """

    slope: float
    intercept: float

    def at(self, tokens: float) -> float:
        """Milliseconds at a context."""
        return self.slope * tokens + self.intercept

    def __str__(self) -> str:
        sign = "-" if self.intercept < 0 else "+"
        return f"{self.slope:.3g} x tokens {sign} {abs(self.intercept):.3g}"


def fit_line(tokens: Sequence[float], ms: Sequence[float]) -> Line | None:
    """The least squares of *relative* errors (times differ in proportion to themselves), None with fewer than two contexts.

    Args:
        tokens: contexts.
        ms: medians at them, above 0.
    """
    if len(set(tokens)) < 2:
        return None
    weights = [1 / y**2 for y in ms]
    total = sum(weights)
    mean_x = sum(w * x for w, x in zip(weights, tokens, strict=True)) / total
    mean_y = sum(w * y for w, y in zip(weights, ms, strict=True)) / total
    spread = sum(w * (x - mean_x) ** 2 for w, x in zip(weights, tokens, strict=True))
    slope = sum(w * (x - mean_x) * (y - mean_y) for w, x, y in zip(weights, tokens, ms, strict=True)) / spread
    return Line(slope, mean_y - slope * mean_x)


def break_even(line: Line, other: Line) -> float | None:
    """The context from which on ``line`` is below ``other``: 0 when it is so everywhere, None when it never is."""
    if line.slope > other.slope or (line.slope == other.slope and line.intercept >= other.intercept):
        return None
    if line.intercept <= other.intercept:
        return 0.0
    return math.ceil((line.intercept - other.intercept) / (other.slope - line.slope))
