"""The command ``alignedkv``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from .bench_models.command import bench_models
from .command_line import positive_list
from .compare.command import compare
from .demo.console import open_console
from .plots.command import plot

GATE_FAILED = 3
"""Exit status of ``alignedkv eval`` when a ``--fail-above`` limit is exceeded."""

app = typer.Typer(
    help="Precision-aligned KV cache for torch.compile: torch.compile(model, backend='alignedkv').",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


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
    # Imported here so that other commands do not wait for transformers.
    from .demo.model import DemoUnavailableError
    from .demo.result import QUICK, Settings
    from .demo.run import run

    base = QUICK if quick else Settings()
    settings = dataclasses.replace(
        base,
        contexts=base.contexts if contexts is None else positive_list(contexts),
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


def _tolerances(text: str) -> tuple[float, ...]:
    try:
        values = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 1,2,4") from None
    if not all(0 < value < float("inf") for value in values):
        raise typer.BadParameter(f"{text!r}: every tolerance of the sweep is a finite number above 0")
    return values


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="'smollm2', a .gguf file, a local folder, or a Hugging Face name.")] = "smollm2",
    text: Annotated[str, typer.Option(help="A UTF-8 file, or 'code', 'prose' or 'table', which come with Python.")] = "code",
    dtype: Annotated[str, typer.Option(help="Of the model and its cache: bfloat16, float16 or float32.")] = "bfloat16",
    contexts: Annotated[str, typer.Option(help="Tokens in the cache before the compared positions, e.g. 512,2048.")] = "2048",
    positions: Annotated[int, typer.Option(min=2, help="Teacher-forced positions at each context.")] = 256,
    tolerances: Annotated[str, typer.Option(help="The sweep, e.g. 1,2,4.")] = "1,2,4",
    compare: Annotated[Path | None, typer.Option(help="Python file whose METHODS are compared at equal bytes.")] = None,
    fail_above: Annotated[
        list[str] | None, typer.Option(help="METRIC=VALUE; exit with 3 when any tolerance exceeds it.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch; its own default if not given.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all results to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the Pareto plot to this .png or .svg.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write plot and tables to this self-contained page.")] = None,
) -> None:
    """What reading fewer bits costs a model: quality and bytes over a sweep of tolerances.

    Perplexity, KL to the same weights in fp32 and top-1 flips, teacher-forced, beside stock 16-bit attention; every layer's
    attention error against float64; bytes read.
    """
    from .evaluate.errors import EvaluationError
    from .evaluate.gates import parse_gate
    from .evaluate.page import write_page
    from .evaluate.plot import draw
    from .evaluate.render import print_result
    from .evaluate.result import Settings
    from .evaluate.run import DTYPES
    from .evaluate.run import evaluate as run_evaluation

    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}", param_hint="--dtype")
    console = open_console()
    settings = Settings(
        model=model,
        text=text,
        dtype=dtype,
        contexts=positive_list(contexts),
        positions=positions,
        tolerances=_tolerances(tolerances),
        compare=compare,
        threads=threads,
    )
    try:
        gates = [parse_gate(entry) for entry in fail_above or ()]
        result = run_evaluation(settings, gates, console)
        print_result(result, console)
        if json_path is not None:
            result.write(json_path)
        if plot is not None:
            draw(result, plot)
        if html is not None:
            write_page(result, html)
    except EvaluationError as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False)
        raise typer.Exit(1) from None
    for written in (json_path, plot, html):
        if written is not None:
            console.print(f"results: {written}")
    if result.violations:
        raise typer.Exit(GATE_FAILED)


@app.command()
def top(
    url: Annotated[str, typer.Argument(help="Where the process serves its metrics, e.g. localhost:9464.")] = "localhost:9464",
    once: Annotated[bool, typer.Option("--once", help="Print one view of all since the process began, then end.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Watch a running process: memory of its caches, bytes read, latency, layers.

    The process serves its metrics with alignedkv_compile.metrics.start(9464). Ctrl-C ends the view.
    """
    from .errors import AlignedKVError

    try:
        from .top.run import show_live, show_once

        if once:
            show_once(url, open_console())
        else:
            show_live(url, interval, open_console())
    except AlignedKVError as error:
        Console(stderr=True).print(f"[red]error:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


@app.command()
def env() -> None:
    """Print processor, threads and versions as JSON: what a bug report or a figure needs."""
    from .demo.environment import describe

    typer.echo(json.dumps(dataclasses.asdict(describe()), indent=2))


app.command("bench-models")(bench_models)
app.command()(compare)
app.command()(plot)

if __name__ == "__main__":
    app()
