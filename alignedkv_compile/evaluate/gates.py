"""``--fail-above METRIC=VALUE``: thresholds that make a regression fail somebody's CI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import EvaluationError
from .scores import Score

METRICS = {
    "bytes": "bytes read over the cache's own bytes",
    "nll": "mean negative log-likelihood, nats",
    "perplexity": "exp of it",
    "delta_nll": "NLL minus fp32's, nats",
    "delta_stock": "NLL minus stock 16-bit's, nats",
    "kl_mean": "mean KL(fp32 || alignedkv), nats",
    "kl_p99": "its 99th percentile",
    "flips": "share of positions whose most likely token is not fp32's",
    "attention_error": "mean relative error of attention outputs against float64",
    "attention_p99": "its 99th percentile",
    "added_rms": "rms error added by the read, in units of the output's rounding error",
    "added_worst": "the same of the worst layer",
}


@dataclass(frozen=True)
class Gate:
    """Fail when ``metric`` of any aligned read exceeds ``limit``."""

    metric: str
    limit: float


def parse_gate(text: str) -> Gate:
    """``"kl_mean=1e-3"`` as a :class:`Gate`.

    Raises:
        EvaluationError: not of that form, or an unknown metric.
    """
    metric, separator, value = text.partition("=")
    if metric not in METRICS:
        raise EvaluationError(f"--fail-above knows no metric {metric!r}; it knows {', '.join(METRICS)}")
    try:
        limit = float(value)
    except ValueError:
        limit = float("nan")
    if not separator or limit != limit:
        raise EvaluationError(f"--fail-above {text!r} is not METRIC=NUMBER, such as {metric}=0.01")
    return Gate(metric, limit)


def violations(gates: Sequence[Gate], scores: Sequence[Score]) -> tuple[str, ...]:
    """One line for every gate that an aligned read exceeds. NaN exceeds every limit."""
    found = []
    for gate in gates:
        for entry in scores:
            if entry.tolerance is None:
                continue
            value = getattr(entry, gate.metric)
            if value is not None and not value <= gate.limit:
                found.append(f"{entry.method} at {entry.context} tokens: {gate.metric} is {value:.4g}, above {gate.limit:.4g}")
    return tuple(found)
