"""What a regression may not exceed: the one place of these limits. ``--check`` and `make test-all` compare with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...storage import EIGHT_BIT, FOUR_BIT_PLUS, LOSSLESS
from .kinds import STOCK
from .result import CacheResult, LanguageScore, RetrievalScore


@dataclass(frozen=True)
class Limit:
    """``metric`` of ``kind`` is at most ``limit``, times that of ``relative_to`` at the same context if given.

    Attributes:
        kind: name of a kind of cache.
        metric: a field of :class:`~.result.LanguageScore` or of :class:`~.result.RetrievalScore`.
        limit: the largest value allowed.
        relative_to: another kind, or None.
    """

    kind: str
    metric: str
    limit: float
    relative_to: str | None = None


LIMITS: tuple[Limit, ...] = (
    Limit(LOSSLESS.name, "bytes", 1.06),
    Limit(LOSSLESS.name, "kl_stock", 0.0),
    Limit(LOSSLESS.name, "lost", 0),
    Limit(EIGHT_BIT.name, "bytes", 0.56),
    Limit(EIGHT_BIT.name, "kl_fp32", 1.5, STOCK),
    Limit(EIGHT_BIT.name, "lost", 0),
    Limit(FOUR_BIT_PLUS.name, "bytes", 0.35),
    Limit(FOUR_BIT_PLUS.name, "kl_fp32", 1.0, "HF quanto 4-bit"),
)


def exceeded(result: CacheResult, limits: Sequence[Limit] = LIMITS) -> tuple[str, ...]:
    """One line for every limit that a score of ``result`` exceeds. NaN exceeds every limit; kinds that were not run none."""
    found = []
    for limit in limits:
        for score in result.scores():
            if score.kind != limit.kind or not hasattr(score, limit.metric):
                continue
            base = 1.0 if limit.relative_to is None else _value(result, limit.relative_to, score, limit.metric)
            value = float(getattr(score, limit.metric))
            if base is not None and not value <= limit.limit * base:
                than = f"{limit.limit:.4g}" + (f" times {limit.relative_to}'s {base:.4g}" if limit.relative_to else "")
                found.append(f"{score.kind} at {score.context} rows: {limit.metric} is {value:.4g}, above {than}")
    return tuple(found)


def _value(result: CacheResult, kind: str, beside: LanguageScore | RetrievalScore, metric: str) -> float | None:
    """The metric of ``kind`` where ``beside`` was measured, None where it was not run."""
    for score in result.scores():
        same = type(score) is type(beside) and score.context == beside.context
        if same and score.kind == kind and getattr(score, "task", None) == getattr(beside, "task", None):
            return float(getattr(score, metric))
    return None
