"""One attention layer over a static cache, by the number of query rows: from how many on stock attention is the faster one?

    python benchmarks/query_rows.py
    python benchmarks/query_rows.py --shapes 32/8/128 --contexts 16384 --rows 1,4,16

A question of a few tokens, or an assistant's candidates, make queries of several rows. Each variant has a cache of its own and
a graph for the number of rows; variants take turns in every round, and medians over rounds are reported. Synthetic numbers:
queries are scaled as those of benchmarks/attention.py, and rows of one query agree no more than its heads do.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.progress import track
from rich.table import Table

from alignedkv_compile.demo.console import open_console
from alignedkv_compile.demo.environment import describe
from attention import empty_inductor_cache
from attention_inputs import query_factor

Variant = Callable[..., torch.Tensor]


def layer(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """A step of one layer: ``S`` new rows ``[1, H, S, D]`` go to ``positions [S]``, then ``[1, Hq, S, D]`` attends."""
    key_cache.index_copy_(2, positions, key)
    value_cache.index_copy_(2, positions, value)
    return F.scaled_dot_product_attention(query, key_cache, value_cache, mask, enable_gqa=True)


def variants() -> dict[str, Variant]:
    """The layer stock and compiled, each new and without graphs of other sizes."""
    torch._dynamo.reset()
    few: dict[str, str | int | bool | Callable[..., object]] = {"strict": True, "calibrate": False}
    return {
        "aligned": torch.compile(layer, backend="alignedkv", dynamic=False, options=few),
        "every bit": torch.compile(layer, backend="alignedkv", dynamic=False, options={**few, "tolerance": 0}),
        "torch.compile": torch.compile(layer, dynamic=False),
        "eager": layer,
    }


def measure(shape: str, context: int, rows: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Median ms of a call, by variant."""
    heads, kv_heads, dim = map(int, shape.split("/"))
    generator = torch.Generator().manual_seed(0)

    def new(count: int, length: int) -> torch.Tensor:
        return torch.randn(1, count, length, dim, generator=generator).to(dtype)

    positions = torch.arange(context - rows, context)
    mask = (torch.arange(context) <= positions[:, None])[None, None]
    query, cache = new(heads, rows), new(kv_heads, context)
    scores = query.view(1, kv_heads, -1, dim).float() @ cache.float().mT * dim**-0.5
    query *= query_factor(scores)
    inputs = (query, new(kv_heads, rows), new(kv_heads, rows), cache, new(kv_heads, context))
    calls = {name: (run, [*(one.clone() for one in inputs), positions, mask]) for name, run in variants().items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, (run, arguments) in calls.items():
            start = time.perf_counter()
            run(*arguments)
            if turn >= 2:  # the first call compiles, and planes are built
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(taken) for name, taken in times.items()}


def main(
    shapes: Annotated[str, typer.Option(help="Query heads/KV heads/head dimension.")] = "32/8/128,9/3/64",
    contexts: Annotated[str, typer.Option(help="Cache rows.")] = "8192",
    rows: Annotated[str, typer.Option(help="Query rows, up to 16.")] = "1,2,3,5,8,12,16",
    dtype: Annotated[str, typer.Option(help="Of K, V and the query.")] = "bfloat16",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every variant.")] = 15,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all results to this file.")] = None,
) -> None:
    """Time queries of several rows. Run on an otherwise idle machine."""
    console = open_console()
    grid = list(itertools.product(shapes.split(","), map(int, contexts.split(",")), map(int, rows.split(","))))
    names = ("aligned", "every bit", "torch.compile", "eager")
    table = Table("shape", "rows of cache", "of query", *(f"{name} ms" for name in names), "faster than stock")
    cases = []
    with empty_inductor_cache(), torch.no_grad():
        for shape, context, count in track(grid, console=console, transient=True):
            took = measure(shape, context, count, getattr(torch, dtype), rounds)
            cases.append({"shape": shape, "context": context, "rows": count, "median_ms": took})
            stock = min(took["torch.compile"], took["eager"])
            figures = (f"{took[name]:.2f}" for name in names)
            gains = (f"{stock / took[name]:.2f}x" for name in ("aligned", "every bit"))
            table.add_row(shape, str(context), str(count), *figures, ", ".join(gains))
    console.print(table)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps({"environment": asdict(describe()), "dtype": dtype, "cases": cases}, indent=2) + "\n")
        console.print(f"results: {json_path}")


if __name__ == "__main__":
    typer.run(main)
