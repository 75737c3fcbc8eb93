"""What ``benchmarks/attention.py`` found: the figures of a case, and its tables for the terminal and for Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.table import Table

from alignedkv_compile.break_even import NEVER
from alignedkv_compile.evaluate.render import Rows
from alignedkv_compile.evaluate.render import markdown as as_markdown
from attention_variants import ALIGNED, DEFAULT, DESCRIPTIONS, GROUPED, PACKED, REPEATED, STREAM

SHORT_DTYPE = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
STOCK = (PACKED, REPEATED, GROUPED)
GOAL = 1.05
"""Time of the default over that of the better read, at most."""


@dataclass(frozen=True)
class Measured:
    """One variant on one case.

    Attributes:
        median_ms, min_ms: per call, over rounds.
        rounds_ms: mean time per call of each round.
        relative_error: ``||o - o64|| / ||o64||`` against float64 attention on the same stored values, first layer.
        bytes_read: per call; for SDPA and streaming the cache in its own dtype.
        bytes_fraction: of the cache in its own dtype.
        bytes_per_row, ns_per_row: per cache row and KV head, K and V together.
        gb_per_s: ``bytes_read`` over the median.
    """

    median_ms: float
    min_ms: float
    rounds_ms: tuple[float, ...]
    relative_error: float
    bytes_read: float
    bytes_fraction: float
    bytes_per_row: float
    ns_per_row: float
    gb_per_s: float


@dataclass(frozen=True)
class Case:
    """All variants on one head shape, context and dtype.

    Attributes:
        effective_keys: mean over heads (and layers) of exp(entropy of the weights).
        copies: layers that the calls went round.
        skipped: why the case was not run, or "".
        least_context: live rows from which on a model on this machine reads few bits by default.
        break_even: share of a head's bytes up to which it does.
    """

    shape: str
    context: int
    dtype: str
    effective_keys: float = 0.0
    copies: int = 0
    skipped: str = ""
    least_context: int = 0
    break_even: float = 0.0
    variants: dict[str, Measured] = field(default_factory=dict)

    def ratio(self, baseline: str) -> float:
        """How many times faster the aligned read is than ``baseline``, by median."""
        return self.variants[baseline].median_ms / self.variants[ALIGNED].median_ms

    @property
    def over_better(self) -> float:
        """Time of the default over that of the better of both reads."""
        times = [self.variants[name].median_ms for name in (ALIGNED, STREAM)]
        return self.variants[DEFAULT].median_ms / min(times)

    @property
    def over_stock(self) -> float:
        """How many times faster the default is than the fastest form of stock."""
        return min(self.variants[name].median_ms for name in STOCK) / self.variants[DEFAULT].median_ms


def time_table(cases: Sequence[Case]) -> Table:
    """Medians of all variants in milliseconds."""
    found = _table("one decode step of one layer, median ms", list(DESCRIPTIONS))
    for case in cases:
        times = (
            [f"{case.variants[name].median_ms:.3f}" for name in DESCRIPTIONS] if case.variants else [f"skipped: {case.skipped}"]
        )
        found.add_row(case.shape, str(case.context), SHORT_DTYPE[case.dtype], *times)
    return found


def ratio_table(cases: Sequence[Case]) -> Table:
    """How many times faster the aligned read is than each baseline, what it reads, and its error beside streaming's."""
    baselines = [name for name in DESCRIPTIONS if name not in (ALIGNED, DEFAULT)]
    figures = [
        "bytes\nread",
        "bytes\n/row",
        "ns\n/row",
        "GB/s",
        "rel.\nerror",
        "error of\nstream",
        "few bits\nfrom",
        "up to",
        "default\nreads",
        "over\nbetter",
    ]
    found = _table("the aligned read: times faster than each, and what it reads", baselines + figures)
    for case in cases:
        if not case.variants:
            continue
        aligned = case.variants[ALIGNED]
        found.add_row(
            case.shape,
            str(case.context),
            SHORT_DTYPE[case.dtype],
            *(f"{case.ratio(name):.2f}" for name in baselines),
            f"{aligned.bytes_fraction:.1%}",
            f"{aligned.bytes_per_row:.0f}",
            f"{aligned.ns_per_row:.2f}",
            f"{aligned.gb_per_s:.1f}",
            f"{aligned.relative_error:.0e}",
            f"{case.variants[STREAM].relative_error:.0e}",
            "never" if case.least_context == NEVER else str(case.least_context),
            f"{case.break_even:.1%}",
            f"{case.variants[DEFAULT].bytes_fraction:.1%}",
            f"{case.over_better:.3f}",
        )
    return found


def derived(case: Case) -> dict[str, object]:
    """What the JSON holds beside the fields of a case."""
    ratios: dict[str, object] = {"ratios": {name: case.ratio(name) for name in case.variants}}
    return ratios | {"over_better": case.over_better} if case.variants else ratios


def _table(title: str, columns: Sequence[str]) -> Table:
    found = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("heads", "context", "dtype"):
        found.add_column(name, no_wrap=True)
    for name in columns:
        found.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    return found


def markdown(cases: Sequence[Case]) -> str:
    """One table of all cases that were run, and how the default did at worst."""
    heads = ("heads q/kv/dim", "context", "dtype", *(f"{name}, ms" for name in DESCRIPTIONS))
    figures = (
        "times stream",
        "times packed",
        "times stock",
        "bytes read",
        "few bits from",
        "up to",
        "default reads",
        "over better",
    )
    run = [case for case in cases if case.variants]
    return as_markdown(Rows("", (*heads, *figures), tuple(_markdown_row(case) for case in run), _at_worst(run)))


def _markdown_row(case: Case) -> tuple[str, ...]:
    never = case.least_context == NEVER
    return (
        case.shape,
        str(case.context),
        SHORT_DTYPE[case.dtype],
        *(_milliseconds(case.variants[name].median_ms) for name in DESCRIPTIONS),
        f"{case.ratio(STREAM):.2f}",
        f"{case.ratio(PACKED):.2f}",
        f"{case.over_stock:.2f}",
        f"{case.variants[ALIGNED].bytes_fraction:.1%}",
        "never" if never else str(case.least_context),
        "" if never else f"{case.break_even:.0%}",
        f"{case.variants[DEFAULT].bytes_fraction:.1%}",
        f"{case.over_better:.3f}",
    )


def _milliseconds(value: float) -> str:
    """With three significant digits, of which none is below a microsecond."""
    return f"{value:.{min(3, max(0, 2 - math.floor(math.log10(value))))}f}"


def _at_worst(run: Sequence[Case]) -> str:
    if not run:
        return "No case was run."
    slowest, nearest = max(run, key=lambda case: case.over_better), min(run, key=lambda case: case.over_stock)
    missed = sum(case.over_better > GOAL for case in run)
    return (
        f"The default takes more than {GOAL:g} times as long as the better of both reads in {missed} of {len(run)} cells,"
        f" {slowest.over_better:.2f} times at most ({_named(slowest)})."
        f" The fastest form of stock takes {nearest.over_stock:.2f} times as long as it or more ({_named(nearest)})."
    )


def _named(case: Case) -> str:
    return f"{case.shape} in {SHORT_DTYPE[case.dtype]} at {case.context} rows"
