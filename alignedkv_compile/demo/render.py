"""The demo's tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .environment import Environment, machine
from .measure import STOCK, Comparison
from .quality import Continuation, Quality
from .result import Result
from .variants import ALIGNED, COMPILED, EAGER


def print_environment(environment: Environment, console: Console) -> None:
    """Processor, threads, instruction sets and versions, in two lines."""
    flags = f" (of {' '.join(environment.flags)})" if environment.flags else ""
    versions = ", ".join(f"{name} {version}" for name, version in environment.packages.items() if version)
    console.print(f"{machine(environment)}{flags}")
    console.print(f"Python {environment.python}, {versions}")


def print_result(result: Result, console: Console) -> None:
    """Every table of the demo, then the backend's own report."""
    console.print(timing_table(result.comparisons, result.model))
    for line in headline(result):
        console.print(line, highlight=False)
    console.print(quality_table(result.qualities))
    console.print(continuation_table(result.continuations))
    console.print(result.report)


def headline(result: Result) -> list[str]:
    """What the backend gains over the best that a user has without it, and the machine that this was measured on."""
    lines = [f"[bold]alignedkv beside the faster of {' and '.join(STOCK)}[/], on {escape(machine(result.environment))}:"]
    for comparison in result.comparisons:
        best, aligned = comparison.of(comparison.best_stock), comparison.of(ALIGNED)
        times = comparison.speedup(ALIGNED, comparison.best_stock)
        lines.append(
            f"  {comparison.context} tokens, {comparison.cache} cache: [bold]{times:.2f} times[/] as fast"
            f" ({best.variant} {best.median_ms:.1f} ms, {ALIGNED} {aligned.median_ms:.1f} ms)"
        )
    return lines


def timing_table(comparisons: Sequence[Comparison], model: str) -> Table:
    """Medians of the variants side by side; speedups are ratios of medians."""
    table = Table(title=f"{model}: one token, decoded in turns with the other variants", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("context", justify="right", no_wrap=True)
    table.add_column("cache", no_wrap=True)
    table.add_column("variant", no_wrap=True)
    for name in (
        "ms/\ntoken",
        "tokens/\ns",
        "times\nbest stock",
        f"times\n{EAGER}",
        "times\ncompile",
        "first\ntoken, s",
        "bytes\nread",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for comparison in comparisons:
        for timing in comparison.timings:
            aligned = timing.variant == ALIGNED
            table.add_row(
                str(comparison.context),
                comparison.cache,
                f"[bold]{timing.variant}[/]" if aligned else timing.variant,
                f"{timing.median_ms:.1f}",
                f"{timing.tokens_per_second:.1f}",
                f"{comparison.speedup(timing.variant, comparison.best_stock):.2f}",
                f"{comparison.speedup(timing.variant, EAGER):.2f}",
                f"{comparison.speedup(timing.variant, COMPILED):.2f}",
                f"{timing.first_token_s:.1f}",
                f"{comparison.bytes.fraction:.1%}" if aligned and comparison.bytes is not None else "",
                end_section=timing is comparison.timings[-1],
            )
    table.caption = (
        f"times: how many times as fast as the faster of the two stock variants, as {EAGER} and as {COMPILED}, by median.\n"
        "first token: compilation included. "
        "bytes read: of what the live rows take in the cache's own dtype."
    )
    return table


def quality_table(qualities: Sequence[Quality]) -> Table:
    """Distance of every variant from the fp32 model."""
    first = qualities[0]
    table = Table(
        title=f"against the same weights in fp32: {first.positions} teacher-forced positions after {first.context} tokens"
    )
    table.add_column("variant")
    for name in ("KL mean, nats", "KL p99", "same top-1", "NLL", "NLL - fp32's"):
        table.add_column(name, justify="right")
    for quality in qualities:
        table.add_row(
            quality.variant,
            f"{quality.kl_mean:.2e}",
            f"{quality.kl_p99:.2e}",
            f"{quality.top1_agreement:.1%}",
            f"{quality.nll:.4f}",
            f"{quality.nll - quality.nll_reference:+.4f}",
        )
    return table


def continuation_table(continuations: Sequence[Continuation]) -> Table:
    """Greedy text, and where it leaves stock eager's."""
    table = Table(title=f"greedy text after {continuations[0].context} tokens")
    table.add_column("variant", no_wrap=True)
    table.add_column(f"same as {EAGER}")
    table.add_column("text")
    for continuation in continuations:
        different = continuation.first_difference
        same = f"all {len(continuation.tokens)} tokens" if different is None else f"first {different} tokens"
        table.add_row(continuation.variant, same, repr(continuation.text))
    return table
