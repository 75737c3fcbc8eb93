"""The command ``alignedkv compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ..demo.console import open_console
from ..run_file import RunFileError, read_run
from .compatible import require_comparable, same_machine, version_changes
from .errors import ComparisonError
from .judge import DEFAULT_LIMIT, FAILING, judge, parse_limits
from .quantities import quantities
from .render import print_changes

REGRESSED, MISUSED = 1, 2
"""Exit statuses; typer's own for wrong arguments is 2, too."""


def compare(
    old: Annotated[Path, typer.Argument(help="JSON of a run of demo, eval, bench-models, make bench or bench-peers.")],
    new: Annotated[Path, typer.Argument(help="JSON of a later run with the same settings.")],
    more_old: Annotated[list[Path] | None, typer.Option("--old", help="A repetition of OLD (repeatable).")] = None,
    more_new: Annotated[list[Path] | None, typer.Option("--new", help="A repetition of NEW (repeatable).")] = None,
    fail_above: Annotated[
        list[str] | None, typer.Option(help=f"Limit, or METRIC=LIMIT (repeatable); {DEFAULT_LIMIT:.0%} if not given.")
    ] = None,
    across_machines: Annotated[
        bool, typer.Option("--across-machines", help="Allow runs of different machines; times are then not judged.")
    ] = False,
    show_all: Annotated[bool, typer.Option("--all", help="List what has not moved, too.")] = False,
) -> None:
    """What became worse between two runs: speed, bytes, memory, KL, perplexity, task scores.

    Medians are compared, and a change within the spread of the repetitions does not count. Exits with 1 when a figure is worse
    by more than its limit, with 2 when the runs cannot be compared.
    """
    console = open_console()
    try:
        limits = parse_limits(fail_above or ())
        before, after = ([read_run(path) for path in paths] for paths in ([old, *(more_old or ())], [new, *(more_new or ())]))
        require_comparable([*before, *after], across_machines=across_machines)
        figures_before, figures_after = ([quantities(run) for run in runs] for runs in (before, after))
    except (ComparisonError, RunFileError) as error:
        Console(stderr=True).print(f"[red]error:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(MISUSED) from None
    for line in version_changes(before[0], after[0]):
        console.print(f"[yellow]{escape(line)}[/]", highlight=False)
    changes = judge(figures_before, figures_after, limits, times_count=same_machine([*before, *after]))
    print_changes(changes, limits, console, show_all=show_all)
    if any(change.verdict in FAILING for change in changes):
        raise typer.Exit(REGRESSED)
