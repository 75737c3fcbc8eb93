"""The table of what moved."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .judge import FAILING, Change, Limits, Summary, Verdict
from .metrics import METRICS

_STYLES = {Verdict.WORSE: "red", Verdict.GONE: "red", Verdict.BETTER: "green", Verdict.NEW: "cyan"}


def print_changes(changes: Sequence[Change], limits: Limits, console: Console, *, show_all: bool) -> None:
    """Print what moved by more than its limit (or everything), then one line that counts it."""
    shown = [change for change in changes if show_all or change.verdict is not Verdict.SAME]
    if shown:
        console.print(_table(shown))
    worse = sum(change.verdict in FAILING for change in changes)
    judged = [change for change in changes if not change.quantity.control]
    others = ", ".join(f"{name} {100 * limit:g}%" for name, limit in limits.by_metric.items())
    allowed = f"{100 * limits.default:g}%" + (f" ({others})" if others else "")
    console.print(
        f"[{'red' if worse else 'green'}]{worse} of {len(judged)} figures worse[/] by more than {allowed},"
        f" {sum(change.verdict is Verdict.BETTER for change in changes)} better;"
        f" {sum(change.quantity.control for change in changes)} of stock beside them",
        highlight=False,
    )
    if any(change.verdict is Verdict.CONTROL for change in changes):
        console.print("[yellow]stock moved too: was the machine busy, or has torch changed?[/]", highlight=False)


def _table(changes: Sequence[Change]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("of what", overflow="fold")
    table.add_column("figure")
    for name in ("old", "new", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for change in changes:
        verdict = change.verdict.value
        if change.quantity.control and change.verdict is not Verdict.CONTROL:
            verdict += ", control"
        table.add_row(
            escape(change.quantity.subject),
            METRICS[change.quantity.metric].title,
            _figure(change.old),
            _figure(change.new),
            _percentage(change),
            verdict,
            style=_STYLES.get(change.verdict, "dim" if change.quantity.control else ""),
        )
    table.caption = "± half of the spread of the repetitions"
    return table


def _figure(summary: Summary | None) -> str:
    if summary is None:
        return "-"
    spread = f" ± {summary.spread / 2:.2g}" if summary.spread else ""
    return f"{summary.median:.4g}{spread}" if abs(summary.median) < 1e6 else f"{summary.median:,.0f}{spread}"


def _percentage(change: Change) -> str:
    if change.old is None or change.new is None:
        return ""
    return "from 0" if math.isinf(change.relative) else f"{change.relative:+.1%}"
