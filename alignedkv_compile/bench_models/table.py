"""One table of all models: rows of text that the terminal and the Markdown share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..demo.environment import machine
from ..demo.measure import Comparison
from ..demo.quality import Quality
from ..demo.result import Result
from ..demo.variants import ALIGNED, COMPILED, EAGER
from .result import SuiteResult

MIB = 2**20
HEADS = (
    "model",
    "context, cache",
    f"{EAGER}, ms",
    f"{COMPILED}, ms",
    f"{ALIGNED}, ms",
    "times best stock",
    "bytes read",
    "held, MiB",
    "KL",
    "rewritten",
)
NOTE = (
    "ms per token, medians. times best stock: how many times as fast as the faster of the two stock variants. bytes read: of"
    " what the live rows take in the cache's own dtype. held, MiB: cache of eager -> cache and all beside it. KL: to the same"
    " weights in fp32, mean in nats, eager -> alignedkv, at the longest context. rewritten: of the attention calls over a"
    " cache in all graphs, prefills aside."
)


def rows(suite: SuiteResult) -> Iterator[tuple[str, ...]]:
    """Cells below :data:`HEADS`: a row for each model, context and cache class, or one that says that there is none."""
    for entry in suite.models:
        if entry.result is None:
            yield (entry.source, "not measured", *[""] * (len(HEADS) - 2))
            continue
        for comparison in entry.result.comparisons:
            yield _row(entry.source, entry.result, comparison)


def _row(source: str, result: Result, comparison: Comparison) -> tuple[str, ...]:
    by_name = {quality.variant: quality for quality in result.qualities}
    eager, aligned = comparison.of(EAGER), comparison.of(ALIGNED)
    report = result.report
    return (
        source,
        f"{comparison.context}, {comparison.cache}",
        f"{eager.median_ms:.1f}",
        f"{comparison.of(COMPILED).median_ms:.1f}",
        f"{aligned.median_ms:.1f}",
        f"{comparison.speedup(ALIGNED, comparison.best_stock):.2f}",
        "" if comparison.bytes is None else f"{comparison.bytes.fraction:.1%}",
        f"{eager.held_bytes[-1] / MIB:.1f} -> {aligned.held_bytes[-1] / MIB:.1f}",
        _divergence(by_name[EAGER], by_name[ALIGNED]) if comparison.context == by_name[ALIGNED].context else "",
        f"{report.rewritten} of {report.found - report.prefill}",
    )


def _divergence(eager: Quality, aligned: Quality) -> str:
    return f"{eager.kl_mean:.1e} -> {aligned.kl_mean:.1e}"


def print_table(suite: SuiteResult, console: Console) -> None:
    """Print the table."""
    caption = f"{machine(suite.environment)}\n{NOTE}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption=caption)
    for index, head in enumerate(HEADS):
        table.add_column(head.replace(" ", "\n"), justify="left" if index < 2 else "right", overflow="fold", no_wrap=index > 1)
    for row in rows(suite):
        table.add_row(*map(escape, row))
    console.print(table)
    for entry in suite.failures:
        console.print(f"[red]{escape(entry.source)}:[/] {escape(entry.failed)}", highlight=False)


def write_markdown(suite: SuiteResult, path: Path) -> None:
    """Write the table as Markdown to ``path``, making its folder."""
    settings, versions = suite.settings, suite.environment.packages
    lines = [
        f"{machine(suite.environment)}, torch {versions['torch']}, transformers {versions['transformers']};"
        f" {suite.dtype}, tolerance {settings.tolerance:g}, {settings.tokens} timed tokens, {settings.positions} positions.",
        "",
        _line(HEADS),
        _line(["---", "---", *["---:"] * (len(HEADS) - 2)]),
        *(_line(row) for row in rows(suite)),
        "",
        NOTE,
        *(f"\nNot measured: {entry.source}: {' '.join(entry.failed.split())}" for entry in suite.failures),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
