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
from .costs_command import costs
from .demo.console import open_console
from .plots.command import plot

GATE_FAILED = 3
"""Exit status of ``alignedkv eval`` and ``alignedkv eval-caches`` when a limit is exceeded."""

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
    min_context: Annotated[
        int | None,
        typer.Option(min=0, help="The backend's option of the same name: 512 to see few bits read; measured if not given."),
    ] = None,
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
        min_context=min_context,
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
    from .evaluate.run import evaluate as run_evaluation
    from .storage import DTYPES

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


@app.command("eval-caches")
def evaluate_caches(
    model: Annotated[str, typer.Argument(help="'smollm2', a .gguf file, a local folder, or a Hugging Face name.")] = "smollm2",
    text: Annotated[str, typer.Option(help="A UTF-8 file, or 'code', 'prose' or 'table', which come with Python.")] = "prose",
    dtype: Annotated[str, typer.Option(help="Of the model and its cache: bfloat16 or float16.")] = "bfloat16",
    full: Annotated[bool, typer.Option("--full", help="32k rows, 16k for retrieval, more needles, slow kinds too.")] = False,
    contexts: Annotated[str | None, typer.Option(help="Rows of the cache for perplexity and KL, e.g. 2048,8192.")] = None,
    retrieval: Annotated[str | None, typer.Option(help="Rows of the cache for retrieval, e.g. 4096; 'none'.")] = None,
    positions: Annotated[int | None, typer.Option(min=2, help="Teacher-forced positions at each context.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="A kind of cache beside stock (repeatable); all if not given.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with 3 when a regression limit is exceeded.")] = False,
    keep: Annotated[Path | None, typer.Option(help="Keep prefills in this folder, and use those that are there.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch; its own default if not given.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all results to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the plot to this .png or .svg.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table to this .md file.")] = None,
) -> None:
    """What storing the KV cache in fewer bits costs a model: quality and held bytes.

    Perplexity and KL to the 16-bit cache and to fp32, and retrieval from long texts: stock, the modes of
    alignedkv_compile.Cache, transformers' QuantizedCache, and fp8. The prefill is the costly part; --keep does each once.
    """
    from .evaluate.caches.limits import exceeded
    from .evaluate.caches.plot import draw_caches
    from .evaluate.caches.render import cache_table
    from .evaluate.caches.result import FULL, CacheSettings
    from .evaluate.caches.run import evaluate_caches as run_evaluation
    from .evaluate.errors import EvaluationError
    from .evaluate.render import markdown as as_markdown
    from .evaluate.render import print_rows

    if dtype not in ("bfloat16", "float16"):
        raise typer.BadParameter(f"{dtype!r} is none of bfloat16, float16", param_hint="--dtype")
    base = FULL if full else CacheSettings()
    lengths = base.retrieval_contexts if retrieval is None else () if retrieval == "none" else positive_list(retrieval)
    settings = dataclasses.replace(
        base,
        model=model,
        text=text,
        dtype=dtype,
        contexts=base.contexts if contexts is None else positive_list(contexts),
        retrieval_contexts=lengths,
        positions=base.positions if positions is None else positions,
        kinds=None if kind is None else tuple(kind),
        keep=keep,
        threads=threads,
    )
    console = open_console()
    try:
        result = run_evaluation(settings, console)
        table = cache_table(result)
        print_rows(table, console)
        if json_path is not None:
            result.write(json_path)
        if plot is not None:
            draw_caches(result, plot)
        if markdown is not None:
            markdown.parent.mkdir(parents=True, exist_ok=True)
            markdown.write_text(as_markdown(table), encoding="utf-8")
    except EvaluationError as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False)
        raise typer.Exit(1) from None
    for written in (json_path, plot, markdown):
        if written is not None:
            console.print(f"results: {written}")
    violations = exceeded(result) if check else ()
    for line in violations:
        console.print(f"[red]above the limit:[/] {line}", highlight=False)
    if violations:
        raise typer.Exit(GATE_FAILED)


@app.command()
def capacity(
    config: Annotated[str, typer.Argument(help="A Hugging Face name, a folder, a config.json, a .gguf file, or 'smollm2'.")],
    memory: Annotated[str, typer.Option(help="The limit, e.g. 16GiB or 80GB.")],
    dtype: Annotated[str, typer.Option(help="Of K and V: bf16, fp16 or fp32.")] = "bf16",
    batch: Annotated[int, typer.Option(min=1, help="Sequences that are decoded together.")] = 1,
    with_weights: Annotated[bool, typer.Option("--with-weights", help="The weights must fit, too, in the same dtype.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")] = None,
) -> None:
    """How many tokens fit into a memory limit, by the way in which the KV cache is stored.

    Stock, planes beside a stock cache, and the modes of alignedkv_compile.Cache. Only the config is read; nothing is allocated.
    """
    from .capacity.errors import CapacityError
    from .capacity.memory import parse_memory
    from .capacity.render import print_capacity
    from .capacity.result import find_capacity
    from .capacity.shapes import DTYPES, find_shapes, load_config

    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}", param_hint="--dtype")
    try:
        limit = parse_memory(memory)
        model = find_shapes(load_config(config), config, DTYPES[dtype], batch)
        found = find_capacity(model, limit, with_weights=with_weights)
    except CapacityError as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False)
        raise typer.Exit(1) from None
    console = open_console()
    print_capacity(found, console)
    if json_path is not None:
        found.write(json_path)
        console.print(f"results: {json_path}")


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
app.command()(costs)
app.command()(plot)

if __name__ == "__main__":
    app()
