"""The command ``alignedkv plot``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ..demo.console import open_console
from ..run_file import RunFileError, read_run
from .draw import draw_all
from .errors import PlotError
from .page import describe_machine, describe_run, write_page
from .series import extract

IMAGES, PAGES = (".png", ".svg", ".pdf"), (".html", ".htm")


def plot(
    runs: Annotated[list[Path], typer.Argument(help="JSON of runs of demo, eval, bench-models, make bench or bench-peers.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A .png, .svg, .pdf or self-contained .html to write.")],
) -> None:
    """Draw runs: latency over context with fitted lines, memory over tokens, bytes by layer and step, quality over bytes."""
    if output.suffix.lower() not in IMAGES + PAGES:
        raise typer.BadParameter(f"{str(output)!r} ends in none of {', '.join(IMAGES + PAGES)}", param_hint="--output")
    console = open_console()
    try:
        read = [read_run(path) for path in runs]
        found = [(run, extract(run)) for run in read]
        series = [(run.path.stem if len(read) > 1 else "", one) for run, part in found for one in part.series]
        if not series:
            raise PlotError(f"there is nothing to draw in {', '.join(str(run.path) for run in read)}")
        if output.suffix.lower() in PAGES:
            write_page(found, output)
        else:
            title = "\n".join(f"{describe_run(run)}: {describe_machine(run)}" for run in read)
            output.parent.mkdir(parents=True, exist_ok=True)
            draw_all(series, title).savefig(output, dpi=130)
    except (PlotError, RunFileError) as error:
        Console(stderr=True).print(f"[red]error:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from None
    for _, part in found:
        for line in part.missing:
            console.print(f"[yellow]not drawn:[/] {escape(line)}", highlight=False)
    console.print(f"pictures: {output}")
