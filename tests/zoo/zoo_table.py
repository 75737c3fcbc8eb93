"""The figures on the screen."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from zoo_figures import failures, figures, reasons
from zoo_page import KINDS
from zoo_results import ClassResult, Verdict


def show(results: Sequence[ClassResult], console: Console) -> None:
    """Print the counts of each kind of cache, the reasons, and what is wrong."""
    each = [figures(results, kind) for kind in KINDS]
    counts = Table("classes", *KINDS, title=f"{len(results)} generative classes")
    counts.add_row("run on stock", *(str(one.on_stock) for one in each))
    counts.add_row("wrong", *(_alarm(one.wrong) for one in each))
    counts.add_row("exceptions", *(_alarm(one.errors) for one in each))
    counts.add_row("with cached attention", *(str(one.attention) for one in each))
    counts.add_row("every site rewritten", *(f"{one.every} ({one.share:.0%})" for one in each))
    counts.add_row("some sites rewritten", *(str(one.some) for one in each))
    counts.add_row("with an unseen cache", *(_alarm(one.unseen) for one in each))
    console.print(counts)
    why = Table("why sites stay as they are", *KINDS, "for example")
    for reason in reasons(results, KINDS):
        why.add_row(reason.text, *(str(reason.classes[kind]) for kind in KINDS), ", ".join(reason.examples))
    console.print(why)
    for verdict in (Verdict.WRONG, Verdict.ERROR):
        for name, message in failures(results, verdict):
            console.print(f"[red]{verdict}[/] {name}: ", end="")
            console.print(message, markup=False, highlight=False)


def _alarm(count: int) -> str:
    return f"[red]{count}[/]" if count else "0"
