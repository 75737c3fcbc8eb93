"""The evaluation's tables: rows of text that the terminal and the HTML page share, and the terminal's rendering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from .result import Result
from .scores import Score


@dataclass(frozen=True)
class Rows:
    """A table as text: a title, column heads, rows, and a note below."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def tables(result: Result) -> tuple[Rows, ...]:
    """Quality, attention error and, when methods were compared, equal bytes; per context."""
    found = []
    for context in result.settings.contexts:
        scores = result.at(context)
        found.append(_quality(result, context, scores))
        found.append(_attention(context, scores))
    if result.equal_bytes:
        found.append(_equal_bytes(result))
    return tuple(found)


def print_result(result: Result, console: Console) -> None:
    """Print every table, then the gates that failed."""
    for rows in tables(result):
        print_rows(rows, console)
    for line in result.violations:
        console.print(f"[red]above the limit:[/] {line}", highlight=False)


def print_rows(rows: Rows, console: Console) -> None:
    """Print one table, its first column left-aligned."""
    table = Table(title=rows.title, caption=rows.note or None, box=box.SIMPLE_HEAD, pad_edge=False)
    for index, head in enumerate(rows.heads):
        table.add_column(head, justify="right" if index else "left", no_wrap=index == 0)
    for row in rows.rows:
        table.add_row(*row)
    console.print(table)


def markdown(rows: Rows) -> str:
    """One table in Markdown, its note below."""
    lines = [rows.heads, tuple("---" for _ in rows.heads), *rows.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + (f"\n\n{rows.note}\n" if rows.note else "\n")


def _quality(result: Result, context: int, scores: Sequence[Score]) -> Rows:
    rows = tuple(
        (
            entry.method,
            f"{entry.bytes:.1%}",
            f"{entry.perplexity:.4f}",
            f"{entry.delta_nll:+.5f} ± {entry.delta_nll_error:.5f}",
            f"{entry.delta_stock:+.5f} ± {entry.delta_stock_error:.5f}",
            f"{entry.kl_mean:.2e} ± {entry.kl_error:.0e}",
            f"{entry.kl_p99:.2e}",
            f"{entry.flips:.1%}",
        )
        for entry in scores
    )
    settings = result.settings
    return Rows(
        f"{result.model}, {settings.dtype}, {settings.text}: {settings.positions} positions after {context} tokens",
        ("method", "bytes", "perplexity", "ΔNLL to fp32", "ΔNLL to stock", "KL mean", "KL p99", "flips"),
        rows,
        f"fp32: NLL {result.nll_reference[context]:.4f}. ± is the standard error over positions. KL(fp32 || method) in nats. "
        "flips: most likely token is not fp32's.",
    )


def _attention(context: int, scores: Sequence[Score]) -> Rows:
    def optional(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    rows = tuple(
        (
            entry.method,
            f"{entry.attention_error:.2e}",
            f"{entry.attention_p99:.2e}",
            f"{max(entry.layer_errors):.2e} (layer {entry.layer_errors.index(max(entry.layer_errors))})",
            optional(entry.added_rms),
            optional(entry.added_median),
            optional(entry.added_p99),
            optional(entry.added_worst),
        )
        for entry in scores
    )
    return Rows(
        f"attention against float64, {context} tokens",
        ("method", "mean", "p99", "worst layer", "added/ρ rms", "median", "p99", "worst layer rms"),
        rows,
        "Relative error of each head's output. added/ρ: before rounding, in units of the output's own rounding error.",
    )


def _equal_bytes(result: Result) -> Rows:
    rows = tuple(
        (
            entry.method,
            str(entry.context),
            f"{entry.bytes:.1%}",
            f"{entry.aligned_bytes:.1%}" + ("" if entry.interpolated else " *"),
            f"{entry.other['kl_mean']:.2e}",
            f"{entry.aligned['kl_mean']:.2e}",
            f"{entry.other['attention_error']:.2e}",
            f"{entry.aligned['attention_error']:.2e}",
        )
        for entry in result.equal_bytes
    )
    return Rows(
        "at equal bytes: the sweep over tolerance, interpolated at the other method's bytes",
        ("method", "context", "bytes", "alignedkv at", "KL mean", "alignedkv", "attention error", "alignedkv"),
        rows,
        "* nearest end of the sweep: the method's bytes lie outside.",
    )
