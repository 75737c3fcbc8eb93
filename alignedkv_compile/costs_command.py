"""The command ``alignedkv costs``."""

from __future__ import annotations

import re
from typing import Annotated

import torch
import typer
from rich import box
from rich.table import Table

from .break_even import NEVER, ReadShape
from .cost.measure import Accuracy
from .cost.options import measured
from .cost.records import RECORDS, Record, machine
from .demo.console import open_console
from .options import UNIT_ROUNDOFF, Options

_SHAPE = re.compile(r"([1-9]\d*)/([1-9]\d*)/([1-9]\d*)")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in UNIT_ROUNDOFF}


def costs(
    shapes: Annotated[
        list[str] | None,
        typer.Argument(help="Query heads/KV heads/head dimension, e.g. 32/8/128: measure these first."),
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"Of the cache: {', '.join(_DTYPES)}.")] = "bfloat16",
    tolerance: Annotated[float, typer.Option(min=0.0, help="The backend's option of the same name.")] = Options.tolerance,
) -> None:
    """What reads of few bits and of all bits cost on this machine: measured when a model is compiled, or here ahead of that.

    Measure on an otherwise idle machine. The file that is named below may be deleted: reads are measured anew then.
    """
    if dtype not in _DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(_DTYPES)}", param_hint="--dtype")
    if tolerance == 0:
        raise typer.BadParameter("tolerance 0 always reads every bit: there is nothing to measure", param_hint="--tolerance")
    reads = [_read(text, _DTYPES[dtype]) for text in shapes or ()]
    for read in reads:
        measured(read, Accuracy(tolerance, UNIT_ROUNDOFF[read.dtype]))
    console = open_console()
    records = RECORDS.all()
    console.print(", ".join(f"{name} {value[:40]}" for name, value in machine().items() if name != "kernels"), highlight=False)
    console.print(f"{RECORDS.path()}", highlight=False, soft_wrap=True)
    if records:
        console.print(_table(records))
    else:
        console.print("nothing has been measured on this machine yet")


def _read(text: str, dtype: torch.dtype) -> ReadShape:
    match = _SHAPE.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not query heads/KV heads/head dimension, e.g. 32/8/128", param_hint="SHAPES")
    query_heads, heads, dim = map(int, match.groups())
    if query_heads % heads:
        raise typer.BadParameter(f"{text!r}: {query_heads} query heads do not share {heads} KV heads", param_hint="SHAPES")
    return ReadShape(torch.device("cpu"), dtype, heads, query_heads // heads, dim, dim)


def _table(records: list[Record]) -> Table:
    table = Table(box=box.SIMPLE, title="ms with few bits / ms with all bits, by live rows")
    contexts = sorted({timing.context for record in records for timing in record.timings})
    table.add_column("read")
    table.add_column("few bits from")
    table.add_column("up to")
    for context in contexts:
        table.add_column(f"{context}", justify="right")
    for record in records:
        cells = {timing.context: f"{timing.aligned_ms:.2f} / {timing.stream_ms:.2f}" for timing in record.timings}
        least = "never" if record.least_context == NEVER else f"{record.least_context} rows"
        most = f"{record.break_even:.0%} of the bytes" if record.break_even else ""
        table.add_row(str(record.kind), least, most, *(cells.get(context, "") for context in contexts))
    return table
