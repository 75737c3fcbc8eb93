"""The command ``alignedkv``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .demo.console import open_console

app = typer.Typer(
    help="Precision-aligned KV cache for torch.compile: torch.compile(model, backend='alignedkv').",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _positive_list(text: str) -> tuple[int, ...]:
    try:
        values = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 2048,7936") from None
    if values[0] < 1:
        raise typer.BadParameter(f"{values[0]} is not a positive number of tokens")
    return values


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="One context of 2k, StaticCache only, fewer tokens.")] = False,
    contexts: Annotated[str | None, typer.Option(help="Context lengths, e.g. 2048,7936.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Timed tokens per variant, context and cache class.")] = None,
    positions: Annotated[int | None, typer.Option(min=1, help="Positions compared with the fp32 model.")] = None,
    tolerance: Annotated[float, typer.Option(min=0.0, help="The backend's option of the same name.")] = 2.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch; its own default if not given.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all results to this file.")] = None,
) -> None:
    """Decode a long document with SmolLM2-135M: stock eager, torch.compile and alignedkv, side by side.

    Under 15 minutes on 2 cores, under 5 with --quick; most of it is what torch.compile takes to compile. Measure on an
    otherwise idle machine.
    """
    # Imported here so that `alignedkv --help` does not wait for torch.
    from .demo.model import DemoUnavailableError
    from .demo.result import QUICK, Settings
    from .demo.run import run

    base = QUICK if quick else Settings()
    settings = dataclasses.replace(
        base,
        contexts=base.contexts if contexts is None else _positive_list(contexts),
        tokens=base.tokens if tokens is None else tokens,
        positions=base.positions if positions is None else positions,
        tolerance=tolerance,
        threads=threads,
    )
    console = open_console()
    try:
        result = run(settings, console)
    except DemoUnavailableError as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False)
        raise typer.Exit(1) from None
    if json_path is not None:
        result.write(json_path)
        console.print(f"results: {json_path}")


@app.command()
def env() -> None:
    """Print processor, threads and versions as JSON: what a bug report or a figure needs."""
    from .demo.environment import describe

    typer.echo(json.dumps(dataclasses.asdict(describe()), indent=2))


if __name__ == "__main__":
    app()
