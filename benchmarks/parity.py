"""Bytes at which the aligned read is as accurate as 16-bit attention: the parity table of docs/quality.md.

    python benchmarks/parity.py --text code --dtype bfloat16 --contexts 512,2048,4096,8000 --json results/parity.json

For every context one decode step of SmolLM2-135M is captured. Each head's output is compared with float64 on the same stored
numbers, for 16-bit attention as it is usually written (``matmul``, ``softmax`` in float32, ``matmul``: transformers'
``eager``), for SDPA, and for the generated kernel over a sweep of tolerances. Where its error, mean or 99th percentile over
heads, equals eager's, the bytes are interpolated. *sidecar* is what the kernel reads; *packed* what it would read if the low
8 bits were a third plane instead of the cache.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from alignedkv_compile.demo.console import open_console
from alignedkv_compile.demo.environment import describe
from alignedkv_compile.evaluate.methods import Aligned, AlignedLayer
from alignedkv_compile.evaluate.teacher_forcing import exact_attention, relative_error
from alignedkv_compile.ops import COUNTER_FIELDS
from alignedkv_compile.options import UNIT_ROUNDOFF
from alignedkv_compile.precision import KAPPA
from capture import Layers, decode_steps

TOLERANCES = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)


@dataclass(frozen=True)
class Point:
    """The kernel at one tolerance and context, over all heads of all layers.

    Attributes:
        tolerance: alpha.
        sidecar, packed: bytes over the cache's own.
        mean, p99: relative error of the output rounded to the cache's dtype, against float64.
        added_rms, added_median, added_p99: error before rounding in units of the output's rounding error.
        added_worst: root mean square of the worst layer.
    """

    tolerance: float
    sidecar: float
    packed: float
    mean: float
    p99: float
    added_rms: float
    added_median: float
    added_p99: float
    added_worst: float


@dataclass(frozen=True)
class Parity:
    """One context: baselines' errors (mean, p99), the sweep, and bytes at parity with ``eager`` (None: outside the sweep)."""

    context: int
    eager: tuple[float, float]
    sdpa: tuple[float, float]
    sweep: tuple[Point, ...]
    at_mean: tuple[float, float] | None
    at_p99: tuple[float, float] | None


def eager_16bit(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``[1, Hq, 1, Dk]`` over ``[1, H, C, Dk]``: transformers' eager attention, every result rounded to 16 bits."""
    rows = query.reshape(1, key.shape[1], -1, query.shape[-1])
    weights = (rows @ key.mT * query.shape[-1] ** -0.5).softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).reshape(query.shape[:-1] + value.shape[-1:])


def sdpa_16bit(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The same by SDPA, a group's query heads as rows of one head."""
    rows = query.reshape(1, key.shape[1], -1, query.shape[-1])
    return scaled_dot_product_attention(rows, key, value).reshape(query.shape[:-1] + value.shape[-1:])


def measure(context: int, layers: Layers) -> Parity:
    """Errors and bytes at one context; ``layers`` are query, key and value of each."""
    outputs = [exact_attention(query, key, value, query.shape[-1] ** -0.5) for query, key, value in layers]
    baselines = []
    for attention in (eager_16bit, sdpa_16bit):
        errors = torch.cat([relative_error(attention(*layer), exact) for layer, exact in zip(layers, outputs, strict=True)])
        baselines.append((float(errors.mean()), float(errors.quantile(0.99))))
    sweep = tuple(_point(tolerance, layers, outputs) for tolerance in TOLERANCES)
    mean, p99 = baselines[0]
    return Parity(context, baselines[0], baselines[1], sweep, _bytes_at(sweep, "mean", mean), _bytes_at(sweep, "p99", p99))


def _point(tolerance: float, layers: Layers, outputs: Sequence[torch.Tensor]) -> Point:
    method = Aligned(tolerance)
    sidecar = packed = full = 0.0
    errors, added = [], []
    for (query, key, value), exact in zip(layers, outputs, strict=True):
        group = query.shape[1] // key.shape[1]
        found = []
        for head in range(key.shape[1]):
            layer = method.prepare(key[:, head : head + 1], value[:, head : head + 1])
            step = layer.attend(query[:, head * group : (head + 1) * group], key.shape[2], query.shape[-1] ** -0.5)
            found.append(step.output)
            sidecar += step.bytes_read
            packed += _packed_bytes(layer, step.bytes_read)
        full += (key.numel() + value.numel()) * key.element_size()
        output = torch.cat(found, 1)
        errors.append(relative_error(output.to(key.dtype), exact))
        added.append(relative_error(output, exact) / (float(KAPPA) * UNIT_ROUNDOFF[key.dtype]))
    error, extra = torch.cat(errors), torch.stack(added)
    return Point(
        tolerance=tolerance,
        sidecar=sidecar / full,
        packed=packed / full,
        mean=float(error.mean()),
        p99=float(error.quantile(0.99)),
        added_rms=float(extra.square().mean().sqrt()),
        added_median=float(extra.median()),
        added_p99=float(extra.flatten().quantile(0.99)),
        added_worst=float(extra.square().mean(1).sqrt().max()),
    )


def _packed_bytes(layer: AlignedLayer, bytes_read: float) -> float:
    """Bytes if rows read in full took their low 8 bits from a third plane; a streamed cache is the three planes."""
    counts = dict(zip(COUNTER_FIELDS, layer.counters[0].tolist(), strict=True))
    if counts["key_rows_full"] == counts["value_rows_full"] == counts["rows"]:
        return bytes_read
    saved = layer.key.element_size() - 1
    rows = counts["key_rows_full"] * layer.key.shape[3] + counts["value_rows_full"] * layer.value.shape[3]
    return bytes_read - rows * saved


def _bytes_at(sweep: Sequence[Point], metric: str, target: float) -> tuple[float, float] | None:
    """Sidecar and packed bytes where ``metric`` equals ``target``: bytes linear in the metric's logarithm."""
    for low, high in itertools.pairwise(sweep):
        first, second = getattr(low, metric), getattr(high, metric)
        if first <= target <= second:
            share = math.log(target / first) / math.log(second / first)
            return low.sidecar + share * (high.sidecar - low.sidecar), low.packed + share * (high.packed - low.packed)
    return None


def parity_table(results: Sequence[Parity]) -> Table:
    """Bytes at parity."""
    table = Table(box=box.SIMPLE_HEAD, title="bytes at parity with eager 16-bit attention, sidecar / packed")
    for head in ("context", "eager mean", "p99", "sdpa mean", "p99", "at eager's mean", "at eager's p99"):
        table.add_column(head, justify="right")
    for result in results:
        parities = ["outside the sweep" if x is None else f"{x[0]:.1%} / {x[1]:.1%}" for x in (result.at_mean, result.at_p99)]
        errors = [f"{x:.2e}" for x in (*result.eager, *result.sdpa)]
        table.add_row(str(result.context), *errors, *parities)
    return table


def promise_table(results: Sequence[Parity]) -> Table:
    """Added error in units of rho at tolerances 1, 2 and 4."""
    table = Table(box=box.SIMPLE_HEAD, title="added error in units of the output's rounding error, over all heads")
    for head in (
        "context",
        "tolerance",
        "sidecar / packed",
        "error mean",
        "p99",
        "added rms",
        "median",
        "p99",
        "worst layer rms",
    ):
        table.add_column(head, justify="right")
    for result in results:
        for point in (p for p in result.sweep if p.tolerance in (1.0, 2.0, 4.0)):
            added = [f"{x:.2f}" for x in (point.added_rms, point.added_median, point.added_p99, point.added_worst)]
            errors = [f"{point.mean:.2e}", f"{point.p99:.2e}"]
            share = f"{point.sidecar:.1%} / {point.packed:.1%}"
            table.add_row(str(result.context), f"{point.tolerance:g}", share, *errors, *added)
    return table


def main(
    text: Annotated[str, typer.Option(help="A text of `alignedkv eval`.")] = "code",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    contexts: Annotated[
        str, typer.Option(help="Cache rows, the decoded token's included; at most 8000.")
    ] = "512,2048,4096,8000",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all points to this file.")] = None,
) -> None:
    """Bytes at parity on real K and V."""
    console = open_console()
    sha256, steps = decode_steps(text, dtype, contexts, console)
    results = [measure(context, layers) for context, layers in steps]
    console.print(parity_table(results))
    console.print(promise_table(results))
    if json_path is not None:
        saved: dict[str, Any] = {"text": text, "sha256": sha256, "dtype": dtype, "environment": asdict(describe())}
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(saved | {"contexts": [asdict(r) for r in results]}, indent=2) + "\n")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
