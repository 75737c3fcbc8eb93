"""The figures of a run, each with its repeated samples where the file holds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..run_file import Kind, RunFile, RunFileError

ALIGNED = "alignedkv"
"""Variants and methods of this package begin so in every file; ``stream`` and ``aligned`` are those of ``make bench`` and
``bench-peers``."""
OURS_IN_BENCH = ("aligned", "stream")
STOCK = "stock"
"""The 16-bit cache of `alignedkv eval-caches`, whose other kinds of cache are all judged."""


@dataclass(frozen=True)
class Quantity:
    """One figure of a run.

    Attributes:
        subject: of what: variant, context and the like.
        metric: a name of :data:`.metrics.METRICS`.
        samples: repetitions, in the order made; one for what does not vary.
        control: measured beside for comparison: it tells of the machine and of torch, and is not judged.
    """

    subject: str
    metric: str
    samples: tuple[float, ...]
    control: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """What the same figure of another run has in common with this one."""
        return self.subject, self.metric


def quantities(run: RunFile) -> tuple[Quantity, ...]:
    """All figures of a run that are compared.

    Raises:
        RunFileError: an entry is missing or is not what it should be.
    """
    try:
        return tuple(_READERS[run.kind](run.data))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunFileError(f"{str(run.path)!r} is incomplete ({type(error).__name__}: {error})") from None


def _demo(data: Mapping[str, Any], prefix: str = "") -> Iterator[Quantity]:
    for comparison in data["comparisons"]:
        where = f"{prefix}{comparison['cache']} {comparison['context']}"
        for timing in comparison["timings"]:
            subject, control = f"{where} {timing['variant']}", timing["variant"] != ALIGNED
            yield Quantity(subject, "ms", tuple(timing["token_ms"]), control)
            yield Quantity(subject, "first_token", (timing["first_token_s"],), control)
            if timing.get("held_bytes"):
                yield Quantity(subject, "held", (timing["held_bytes"][-1],), control)
        if comparison["bytes"] is not None:
            yield Quantity(f"{where} {ALIGNED}", "bytes", (comparison["bytes"]["fraction"],))
    for quality in data["quality"]:
        subject, control = f"{prefix}{quality['context']} {quality['variant']}", quality["variant"] != ALIGNED
        yield Quantity(subject, "kl_mean", (quality["kl_mean"],), control)
        yield Quantity(subject, "kl_p99", (quality["kl_p99"],), control)
        yield Quantity(subject, "top1", (quality["top1_agreement"],), control)
        yield Quantity(subject, "perplexity", (math.exp(quality["nll"]),), control)
    yield Quantity(f"{prefix}all graphs", "rewritten", (data["report"]["rewritten"],))


def _attention(data: Mapping[str, Any]) -> Iterator[Quantity]:
    for case in data["cases"]:
        for name, measured in case["variants"].items():
            subject, control = f"{case['shape']} {case['context']} {case['dtype']} {name}", name not in OURS_IN_BENCH
            yield Quantity(subject, "call_ms", tuple(measured["rounds_ms"]), control)
            yield Quantity(subject, "error", (measured["relative_error"],), control)
            if name == OURS_IN_BENCH[0]:
                yield Quantity(subject, "bytes", (measured["bytes_fraction"],))


def _eval(data: Mapping[str, Any]) -> Iterator[Quantity]:
    for score in data["scores"]:
        subject, control = f"{score['context']} {score['method']}", score["tolerance"] is None
        for metric in ("bytes", "perplexity", "kl_mean", "kl_p99", "attention_error", "attention_p99", "added_rms"):
            if score[metric] is not None:
                yield Quantity(subject, metric, (score[metric],), control)
        yield Quantity(subject, "top1", (1.0 - score["flips"],), control)


def _caches(data: Mapping[str, Any]) -> Iterator[Quantity]:
    for score in data["language"]:
        subject, control = f"{score['context']} {score['kind']}", score["kind"] == STOCK
        yield Quantity(subject, "held", (score["held"],), control)
        yield Quantity(subject, "perplexity", (score["perplexity"],), control)
        yield Quantity(subject, "kl_mean", (score["kl_fp32"],), control)
        yield Quantity(subject, "top1", (1.0 - score["flips"],), control)
    for score in data["retrieval"]:
        subject = f"{score['task']} {score['context']} {score['kind']}"
        yield Quantity(subject, "score", (score["right"] / score["questions"],), score["kind"] == STOCK)


def _models(data: Mapping[str, Any]) -> Iterator[Quantity]:
    for entry in data["models"]:
        if entry["result"] is not None:
            yield from _demo(entry["result"], f"{entry['source']} ")


_READERS: Mapping[Kind, Callable[[Mapping[str, Any]], Iterator[Quantity]]] = {
    Kind.DEMO: _demo,
    Kind.ATTENTION: _attention,
    Kind.PEERS: _attention,
    Kind.EVAL: _eval,
    Kind.CACHES: _caches,
    Kind.MODELS: _models,
}
