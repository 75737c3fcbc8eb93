"""What the pictures show, taken from the JSON of a run: plain numbers, nothing drawn yet."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..run_file import Kind, RunFile, RunFileError
from .fit import Line, fit_line

ALIGNED_NAMES = ("alignedkv", "aligned")
"""What files call this backend's variant."""


@dataclass(frozen=True)
class Curve:
    """A variant's values over the number of tokens in the cache."""

    name: str
    tokens: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Memory:
    """Bytes held over tokens, a curve for each variant."""

    title: str
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class Latencies:
    """Milliseconds over context.

    Attributes:
        title: cache class, or heads and dtype.
        curves: medians at each context, a curve for each variant.
        samples: every single timing, likewise; empty where the medians are enough.
        unit: what takes the time.
    """

    title: str
    curves: tuple[Curve, ...]
    samples: tuple[Curve, ...]
    unit: str

    def lines(self) -> dict[str, Line]:
        """The fitted line of each variant that was measured at two contexts or more."""
        fitted = {curve.name: fit_line(curve.tokens, curve.values) for curve in self.curves}
        return {name: line for name, line in fitted.items() if line is not None}


@dataclass(frozen=True)
class HeatMap:
    """Share of the layer's bytes that each decode step read, ``[layers][steps]``."""

    title: str
    shares: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Point:
    """One way of reading the cache.

    Attributes:
        name: of the variant; points of one name are joined.
        bytes: bytes read, or held, over the cache's own.
        value: the error.
        note: what stands beside the point (a tolerance, a context), or "".
    """

    name: str
    bytes: float
    value: float
    note: str = ""


@dataclass(frozen=True)
class Quality:
    """An error over bytes.

    Attributes:
        title: context and the like.
        label: the error.
        points: one or more for each way of reading the cache.
        of: what is done with the bytes.
    """

    title: str
    label: str
    points: tuple[Point, ...]
    of: str = "read"


AnySeries = Memory | Latencies | HeatMap | Quality


@dataclass(frozen=True)
class Extract:
    """What a run has to show.

    Attributes:
        series: in the order in which they are drawn.
        missing: what cannot be drawn, and why.
    """

    series: tuple[AnySeries, ...]
    missing: tuple[str, ...] = ()


def extract(run: RunFile) -> Extract:
    """What the pictures of a run show.

    Raises:
        RunFileError: an entry is missing or is not what it should be.
    """
    try:
        return _READERS[run.kind](run.data)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RunFileError(f"{str(run.path)!r} is incomplete ({type(error).__name__}: {error})") from None


def _demo(data: Mapping[str, Any], prefix: str = "") -> Extract:
    series: list[AnySeries] = []
    missing: list[str] = []
    caches = list(dict.fromkeys(comparison["cache"] for comparison in data["comparisons"]))
    for cache in caches:
        chosen = sorted((c for c in data["comparisons"] if c["cache"] == cache), key=lambda c: c["context"])
        title = f"{prefix}{cache} cache"
        series.append(_demo_latencies(title, chosen))
        if all(timing.get("held_bytes") for comparison in chosen for timing in comparison["timings"]):
            series.append(Memory(title, _over_tokens(chosen, "held_bytes")))
        else:
            missing.append(f"memory over tokens, {title}: the file is of an older version, which did not record bytes held")
        for comparison in chosen:
            heat = f"{title}, {comparison['context']} tokens"
            if comparison["bytes"] is not None and comparison["bytes"].get("read_by_step"):
                series.append(_heat_map(heat, comparison["bytes"]))
            else:
                missing.append(f"bytes by layer and step, {heat}: the file is of an older version, which did not record them")
        if len(chosen) < 2:
            missing.append(f"a fitted line, {title}: it takes two contexts, and the run has one")
    if all("bytes" in quality for quality in data["quality"]):
        points = tuple(Point(q["variant"], q["bytes"], q["kl_mean"]) for q in data["quality"])
        context = data["quality"][0]["context"]
        series.append(Quality(f"{prefix}{context} tokens", "KL(fp32 || variant), mean, nats", points))
    else:
        missing.append("quality over bytes: the file is of an older version, which did not record the bytes")
    return Extract(tuple(series), tuple(missing))


def _demo_latencies(title: str, comparisons: Sequence[Mapping[str, Any]]) -> Latencies:
    samples = _over_tokens(comparisons, "token_ms")
    names = [curve.name for curve in samples]
    curves = []
    for name in names:
        timings = [(c["context"], t) for c in comparisons for t in c["timings"] if t["variant"] == name]
        medians = tuple(statistics.median(timing["token_ms"]) for _, timing in timings)
        curves.append(Curve(name, tuple(context for context, _ in timings), medians))
    return Latencies(title, tuple(curves), samples, "token")


def _over_tokens(comparisons: Sequence[Mapping[str, Any]], entry: str) -> tuple[Curve, ...]:
    """What was recorded after each timed call, over the rows that the cache then had."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for comparison in comparisons:
        for timing in comparison["timings"]:
            tokens, values = found.setdefault(timing["variant"], ([], []))
            first = comparison["context"] + 1 + len(timing["warm_up_s"]) + 1
            tokens += range(first, first + len(timing[entry]))
            values += timing[entry]
    return tuple(Curve(name, tuple(tokens), tuple(values)) for name, (tokens, values) in found.items())


def _heat_map(title: str, found: Mapping[str, Any]) -> HeatMap:
    steps = [
        [read / full if full else 0.0 for read, full in zip(*step, strict=True)]
        for step in zip(found["read_by_step"], found["full_by_step"], strict=True)
    ]
    return HeatMap(title, tuple(zip(*steps, strict=True)))


def _attention(data: Mapping[str, Any]) -> Extract:
    """The operator alone, with or without other libraries' beside it: a variant may lack some contexts."""
    cases = [case for case in data["cases"] if case["variants"]]
    series: list[AnySeries] = []
    for shape, dtype in dict.fromkeys((case["shape"], case["dtype"]) for case in cases):
        chosen = sorted((c for c in cases if (c["shape"], c["dtype"]) == (shape, dtype)), key=lambda case: case["context"])
        title, names = f"{shape} {dtype}", dict.fromkeys(name for case in chosen for name in case["variants"])
        found = {
            name: [(case["context"], case["variants"][name]) for case in chosen if name in case["variants"]] for name in names
        }
        curves = tuple(
            Curve(name, tuple(context for context, _ in each), tuple(measured["median_ms"] for _, measured in each))
            for name, each in found.items()
        )
        series.append(Latencies(title, curves, (), "call of a layer"))
        points = tuple(
            Point(name, measured["bytes_fraction"], measured["relative_error"], str(context))
            for name, each in found.items()
            for context, measured in each
        )
        series.append(Quality(title, "relative error against float64", points))
    missing = [f"{_case(case)}: {case['skipped']}" for case in data["cases"] if case["skipped"]]
    missing += [f"{_case(case)}, {name}: {why}" for case in cases for name, why in case.get("refused", {}).items()]
    return Extract(tuple(series), tuple(missing))


def _case(case: Mapping[str, Any]) -> str:
    return f"{case['shape']} {case['context']} {case['dtype']}"


_EVAL_METRICS = {
    "kl_mean": "KL(fp32 || method), mean, nats",
    "attention_error": "attention error against float64, mean",
    "perplexity": "perplexity",
}


def _eval(data: Mapping[str, Any]) -> Extract:
    series: list[AnySeries] = []
    for context in data["settings"]["contexts"]:
        scores = [score for score in data["scores"] if score["context"] == context]
        for metric, label in _EVAL_METRICS.items():
            points = tuple(
                Point(score["method"], score["bytes"], score[metric])
                if score["tolerance"] is None
                else Point(ALIGNED_NAMES[0], score["bytes"], score[metric], f"{score['tolerance']:g}")
                for score in scores
            )
            series.append(Quality(f"{context} tokens", label, points))
    return Extract(tuple(series))


def _caches(data: Mapping[str, Any]) -> Extract:
    series = [
        Quality(
            f"{context} tokens",
            "KL(fp32 || kind of cache), mean, nats",
            tuple(Point(s["kind"], s["bytes"], s["kl_fp32"]) for s in data["language"] if s["context"] == context),
            "held",
        )
        for context in data["settings"]["contexts"]
    ]
    return Extract(tuple(series), tuple(f"{kind}: {reason}" for kind, reason in data["left_out"].items()))


def _models(data: Mapping[str, Any]) -> Extract:
    found = [
        _demo(entry["result"], f"{entry['source']}, ")
        if entry["result"] is not None
        else Extract((), (f"{entry['source']}: {entry['failed']}",))
        for entry in data["models"]
    ]
    series = tuple(one for part in found for one in part.series)
    return Extract(series, tuple(line for part in found for line in part.missing))


_READERS: Mapping[Kind, Callable[[Mapping[str, Any]], Extract]] = {
    Kind.DEMO: _demo,
    Kind.ATTENTION: _attention,
    Kind.PEERS: _attention,
    Kind.EVAL: _eval,
    Kind.CACHES: _caches,
    Kind.MODELS: _models,
}
