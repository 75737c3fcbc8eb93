"""Every generative class of transformers, tiny: does the backend give stock's results, and how much of it is rewritten?

    python tests/zoo/zoo.py --only llama,gemma2      # names of classes or model types; all without it

The result of each class is kept in results/zoo; a class is run again when it is missing or when the sources changed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from zoo_classes import generative_classes, select
from zoo_page import page
from zoo_pool import Limits, default_folder, run_tasks, tasks
from zoo_results import ROOT, ClassResult, ResultFolder, Verdict, source_version
from zoo_table import show
from zoo_worker import DTYPES

GIB = 2**30
PAGE = ROOT / "docs" / "zoo.md"


def main(
    only: Annotated[str, typer.Option(help="class names or model types, separated by commas")] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="run every class again")] = False,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="through Inductor, as users do; hours instead of minutes")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="processes at a time")] = os.cpu_count() or 1,
    dtypes: Annotated[str, typer.Option(help="separated by commas")] = "bfloat16,float32",
    seconds: Annotated[float, typer.Option(help="time limit of one class and dtype")] = 120.0,
    memory: Annotated[float, typer.Option(help="memory limit of one process, GiB")] = 6.0,
    page_only: Annotated[
        bool, typer.Option("--page", help="run nothing: write docs/zoo.md from the results there are")
    ] = False,
) -> None:
    """Run what is missing, print the figures, and write docs/zoo.md after a run over all classes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no class goes on without us
    console = Console()
    try:
        classes = select(generative_classes(), only.split(","))
    except KeyError as error:
        raise typer.BadParameter(
            f"{error.args[0]} is neither a generative class nor its model type", param_hint="--only"
        ) from None
    folder = ResultFolder(default_folder(ROOT, compiled=compiled), source_version(compiled=compiled))
    if fresh:
        folder.clear()
    if page_only:
        folder = ResultFolder(folder.path)  # whatever sources they were made from; the page says how many
        _write_page(folder.read_all(entry.name for entry in classes), console)
        return
    missing = tasks(classes, folder, dtypes.split(","))
    random.Random(0).shuffle(missing)  # what is done by the time of an interruption is a fair sample
    limits = Limits(seconds * (5 if compiled else 1), int(memory * GIB))
    for number, result in enumerate(run_tasks(missing, folder, limits, jobs=jobs, compiled=compiled), 1):
        console.print(f"{number}/{len(missing)} {_line(result)}", highlight=False, markup=False, soft_wrap=True)
    results = folder.read_all(entry.name for entry in classes)
    show(results, console)
    if not only and not compiled and not tasks(classes, folder, tuple(DTYPES)):
        _write_page(results, console)
    if any(run.verdict in (Verdict.WRONG, Verdict.ERROR) for result in results for run in result.runs):
        raise typer.Exit(1)


def _write_page(results: Sequence[ClassResult], console: Console) -> None:
    PAGE.write_text(page(results))
    console.print(f"wrote {PAGE.relative_to(ROOT)}")


def _line(result: ClassResult) -> str:
    verdicts = {run.verdict for run in result.runs}
    worst = next(v for v in (Verdict.ERROR, Verdict.WRONG, Verdict.RIGHT, Verdict.NOT_ON_STOCK) if v in verdicts)
    message = next((run.message for run in result.runs if run.verdict is worst and run.message), "")
    return f"{result.name}: {worst} {message}"


if __name__ == "__main__":
    typer.run(main)
