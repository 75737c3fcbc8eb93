"""What is compared, and which direction is the better one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A kind of figure.

    Attributes:
        title: what tables call it, with its unit.
        higher_is_better: else lower is.
        timed: whether it differs from one repetition to the next on one machine, and between machines.
    """

    title: str
    higher_is_better: bool = False
    timed: bool = False


METRICS: Mapping[str, Metric] = {
    "ms": Metric("ms per token", timed=True),
    "call_ms": Metric("ms per call", timed=True),
    "first_token": Metric("first token, s", timed=True),
    "bytes": Metric("bytes read, of the cache's"),
    "held": Metric("bytes held"),
    "kl_mean": Metric("KL to fp32, mean, nats"),
    "kl_p99": Metric("KL to fp32, p99, nats"),
    "perplexity": Metric("perplexity"),
    "top1": Metric("same top-1 as fp32", higher_is_better=True),
    "attention_error": Metric("attention error, mean"),
    "attention_p99": Metric("attention error, p99"),
    "added_rms": Metric("error added by the read, rms"),
    "error": Metric("relative error"),
    "rewritten": Metric("attention calls rewritten", higher_is_better=True),
    "score": Metric("task score", higher_is_better=True),
}
"""By the names that ``--fail-above NAME=LIMIT`` takes."""
