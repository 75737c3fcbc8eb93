"""The command ``alignedkv bench-models``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..command_line import positive_list
from ..demo.console import open_console

CACHES = ("static", "dynamic")
INCOMPLETE = 1
"""Exit status when a model could not be measured."""


def bench_models(
    models: Annotated[list[str], typer.Argument(help="Hugging Face names, local folders, .gguf files, or 'smollm2'.")],
    contexts: Annotated[str, typer.Option(help="Context lengths, e.g. 2048,7936.")] = "2048",
    caches: Annotated[str, typer.Option(help="Cache classes, of static and dynamic.")] = "static",
    tokens: Annotated[int, typer.Option(min=1, help="Timed tokens per variant, context and cache class.")] = 24,
    positions: Annotated[int, typer.Option(min=1, help="Positions compared with the fp32 model.")] = 32,
    tolerance: Annotated[float, typer.Option(min=0.0, help="The backend's option of the same name.")] = 2.0,
    dtype: Annotated[str, typer.Option(help="Of models and caches: bfloat16, float16 or float32.")] = "bfloat16",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch; its own default if not given.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all results to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table to this Markdown file.")] = None,
) -> None:
    """Decode with several models: stock eager, torch.compile and alignedkv, with bytes and KL, as one table.

    Each model is measured as in `alignedkv demo`; files are written after each. Exits with 1 when one could not be measured.
    """
    from ..demo.result import Settings
    from ..storage import DTYPES
    from .result import SuiteResult
    from .run import run_suite
    from .table import print_table, write_markdown

    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}", param_hint="--dtype")
    settings = Settings(
        contexts=positive_list(contexts),
        caches=_caches(caches),
        tokens=tokens,
        positions=positions,
        tolerance=tolerance,
        threads=threads,
    )

    def write(suite: SuiteResult) -> None:
        if json_path is not None:
            suite.write(json_path)
        if markdown is not None:
            write_markdown(suite, markdown)

    console = open_console()
    suite = run_suite(models, settings, DTYPES[dtype], console, write)
    print_table(suite, console)
    for written in (json_path, markdown):
        if written is not None:
            console.print(f"results: {written}")
    if suite.failures:
        raise typer.Exit(INCOMPLETE)


def _caches(text: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(text.split(",")))
    if not set(found) <= set(CACHES):
        raise typer.BadParameter(f"{text!r} is not a list of {' and '.join(CACHES)}", param_hint="--caches")
    return found
