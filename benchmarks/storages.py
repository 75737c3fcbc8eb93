"""One layer's decode step over a cache that is made of planes, beside planes next to a 16-bit cache: bytes held, time, error.

    python benchmarks/storages.py
    python benchmarks/storages.py --shapes 9/3/64 --contexts 8192 --kv results/smollm2.pt

Each variant writes one row and reads the cache, as a model's layer does at every token. Copies of K and V go round until they
take ``--footprint-mib``, variants take turns in every round, and medians over rounds are reported. Bytes held are those of the
tensors that a step keeps between calls.
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track
from rich.table import Table

from alignedkv_compile import lowering
from alignedkv_compile.arena_memory import zeroed_arena
from alignedkv_compile.cache import rows as cache_rows
from alignedkv_compile.demo.console import open_console
from alignedkv_compile.demo.environment import describe
from alignedkv_compile.layout import ArenaLayout, arena_layout
from alignedkv_compile.ops import aligned_read_attention, packed_read_attention, quantize_on_write, store_rows
from alignedkv_compile.options import UNIT_ROUNDOFF
from alignedkv_compile.plane_builder import PLANE_BUILDER
from alignedkv_compile.storage import PACKED, STORAGES
from attention import empty_inductor_cache
from attention_inputs import Layer, Shape, captured, exact_attention, made_up

BESIDE = "beside"
Step = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Variant:
    """A way to hold a layer's K and V.

    Attributes:
        steps: one for each copy of the layer: write the last row, attend to all.
        held: bytes of one copy.
    """

    steps: tuple[Step, ...]
    held: int


def beside(layers: list[Layer], tolerance: float) -> Variant:
    """Planes next to the cache tensors."""

    def step(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, planes: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        new_key, new_value = key[:, :, -1:], value[:, :, -1:]
        quantize_on_write(planes, new_key, new_value, positions, key.shape[2])
        scale, unit = key.shape[3] ** -0.5, UNIT_ROUNDOFF[key.dtype]
        return aligned_read_attention(query, key, value, planes, None, None, key.shape[2], scale, 0.0, tolerance, unit, 1)

    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    steps: list[Step] = []
    for layer in layers:
        planes = zeroed_arena(arena_layout(layer.key, layer.value).total, layer.key.device)
        PLANE_BUILDER.rebuild(planes, layer.key, layer.value, layer.context)
        last = torch.tensor([layer.context - 1])
        steps.append(functools.partial(compiled, layer.query, layer.key, layer.value, planes, last))
    return Variant(tuple(steps), layers[0].bytes_full + planes.nbytes)


def packed(layers: list[Layer], storage: str, tolerance: float) -> Variant:
    """Planes that are the cache."""
    shape, dtype = layers[0].shape, layers[0].key.dtype
    context, dim = layers[0].context, shape.head_dim

    def step(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, planes: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        store_rows(planes, key, value, positions, context, storage)
        call = (shape.heads, dim, dtype, storage, context, context)
        return packed_read_attention(query, planes, None, None, *call, dim**-0.5, 0.0, tolerance, UNIT_ROUNDOFF[dtype], 1)

    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    layout = ArenaLayout(shape.heads, context, dim, dim, STORAGES[storage], dtype.itemsize)
    steps: list[Step] = []
    for layer in layers:
        planes = zeroed_arena(layout.total, layer.key.device)
        cache_rows.store(planes, layer.key, layer.value, torch.arange(context), context, storage)
        last = torch.tensor([context - 1])
        key, value = layer.key[:, :, -1:].clone(), layer.value[:, :, -1:].clone()
        steps.append(functools.partial(compiled, layer.query, key, value, planes, last))
    return Variant(tuple(steps), planes.nbytes)


def measure(layers: list[Layer], tolerance: float, rounds: int) -> dict[str, dict[str, float]]:
    """For each variant: median ms, bytes held over the cache's in its dtype, and the error against float64."""
    torch._dynamo.reset()
    variants = {BESIDE: beside(layers, tolerance)} | {name: packed(layers, name, tolerance) for name in PACKED}
    exact = exact_attention(layers[0])
    errors = {name: float((one.steps[0]().double() - exact).norm() / exact.norm()) for name, one in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name in list(variants)[turn % len(variants) :] + list(variants)[: turn % len(variants)]:
            steps = variants[name].steps
            start = time.perf_counter()
            for one in steps:
                one()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start) / len(steps))
    return {
        name: {
            "median_ms": statistics.median(times[name]),
            "held": one.held / layers[0].bytes_full,
            "error": errors[name],
        }
        for name, one in variants.items()
    }


def main(
    shapes: Annotated[str, typer.Option(help="Query heads/KV heads/head dimension.")] = "32/8/128,9/3/64",
    contexts: Annotated[str, typer.Option(help="Cache rows.")] = "2048,8192",
    dtypes: Annotated[str, typer.Option(help="Of K, V and the query.")] = "bfloat16",
    tolerance: Annotated[float, typer.Option(min=0.0, help="Of the read.")] = 2.0,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every variant.")] = 15,
    footprint_mib: Annotated[float, typer.Option(help="16-bit bytes of all copies of a layer together.")] = 256.0,
    kv: Annotated[Path | None, typer.Option(help="Layers captured by capture.py, instead of made-up ones.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all results to this file.")] = None,
) -> None:
    """Compare ways to hold a cache. Run on an otherwise idle machine."""
    console = open_console()
    lowering.register()
    grid: list[tuple[str, int, str]] = list(
        itertools.product(shapes.split(","), map(int, contexts.split(",")), dtypes.split(","))
    )
    if kv is not None:
        grid = [("captured", 0, "")]
    table = Table("shape", "rows", "dtype", "held as", "bytes held", "ms", "beside / it", "error")
    cases = []
    with empty_inductor_cache(), torch.no_grad():
        for shape, context, dtype in track(grid, console=console, transient=True):
            layers = captured(kv) if kv is not None else _copies(shape, context, dtype, footprint_mib)
            found = measure(layers, tolerance, rounds)
            name, rows, held_in = str(layers[0].shape), layers[0].context, str(layers[0].key.dtype).removeprefix("torch.")
            cases.append({"shape": name, "context": rows, "dtype": held_in, "variants": found})
            for how, one in found.items():
                ratio = found[BESIDE]["median_ms"] / one["median_ms"]
                figures = (f"{one['held']:.3f}", f"{one['median_ms']:.3f}", f"{ratio:.2f}x", f"{one['error']:.1e}")
                table.add_row(name, str(rows), held_in, how, *figures)
    console.print(table)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps({"environment": asdict(describe()), "cases": cases}, indent=2) + "\n")
        console.print(f"results: {json_path}")


def _copies(shape: str, context: int, dtype: str, footprint_mib: float) -> list[Layer]:
    heads = Shape(*map(int, shape.split("/")))
    layer = made_up(heads, context, getattr(torch, dtype))
    return [layer.clone() for _ in range(max(1, min(64, int(footprint_mib * 2**20 / layer.bytes_full))))]


if __name__ == "__main__":
    typer.run(main)
