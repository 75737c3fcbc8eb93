"""The order of steps of a GPU beside the CPU's, on real K and V: bytes, error, candidates, and how often it gives up.

    python benchmarks/order_of_steps.py --text code --dtype bfloat16 --contexts 2048,4096,8000 --json results/order.json

For every context one decode step of SmolLM2-135M is captured. The CPU's order runs as the reference's
``aligned_read_attention``, the GPU's as ``read_scanned``, whose decisions are the Triton kernels' row for row (tests/triton).
No GPU is needed, and none is timed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.table import Table

from alignedkv_compile import ops
from alignedkv_compile.arena import mark
from alignedkv_compile.demo.console import open_console
from alignedkv_compile.demo.environment import describe
from alignedkv_compile.evaluate.teacher_forcing import exact_attention, relative_error
from alignedkv_compile.layout import arena_layout
from alignedkv_compile.options import UNIT_ROUNDOFF
from alignedkv_compile.precision import KAPPA
from alignedkv_compile.reference_scan import ScanCounts, read_scanned
from capture import Layers, decode_steps

SPLITS = 16
"""Programs of a pair; only whether a program streams its own share depends on it."""


@dataclass(frozen=True)
class Order:
    """One order of steps over all heads of all layers.

    Attributes:
        bytes: read, over the cache's own.
        added_rms, added_p99, added_worst: error before rounding in units of the output's rounding error: over all heads, and
            of the worst layer.
    """

    bytes: float
    added_rms: float
    added_p99: float
    added_worst: float


@dataclass(frozen=True)
class Comparison:
    """One context.

    Attributes:
        candidates: rows that the GPU's order lists, over all rows.
        pairs, pairs_unread, pairs_misjudged, shares_streamed, largest_norm_ratio: as in
            :class:`~alignedkv_compile.reference_scan.ScanCounts`.
    """

    context: int
    cpu: Order
    gpu: Order
    candidates: float
    pairs: int
    pairs_unread: int
    pairs_misjudged: int
    shares_streamed: int
    largest_norm_ratio: float


def compare(context: int, layers: Layers, tolerance: float) -> Comparison:
    """Both orders over the captured layers of one context."""
    counters = torch.zeros(1, len(ops.COUNTER_FIELDS), dtype=torch.int64)
    counts = ScanCounts()

    def cpu(*call: Any) -> torch.Tensor:
        return ops.aligned_read_attention.counted(*call, counters, 0)

    def gpu(*call: Any) -> torch.Tensor:
        return read_scanned(*call, splits=SPLITS, counts=counts)

    added_cpu, added_gpu = (_added(layers, tolerance, read) for read in (cpu, gpu))
    stated = dict(zip(ops.COUNTER_FIELDS, counters[0].tolist(), strict=True))
    full = sum((key.numel() + value.numel()) * key.element_size() for _, key, value in layers)
    rows = sum(key.shape[1] * key.shape[2] for _, key, _ in layers)
    return Comparison(
        context,
        cpu=_order(stated["bytes_read"] / full, added_cpu),
        gpu=_order(counts.bytes_read / full, added_gpu),
        candidates=counts.candidates / rows,
        pairs=counts.pairs,
        pairs_unread=counts.pairs_unread,
        pairs_misjudged=counts.pairs_misjudged,
        shares_streamed=counts.shares_streamed,
        largest_norm_ratio=counts.largest_norm_ratio,
    )


def _added(layers: Layers, tolerance: float, read: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Added error ``[layers, heads]`` in units of the output's rounding error."""
    errors = []
    for query, key, value in layers:
        layout, rows = arena_layout(key, value), key.shape[2]
        planes = torch.zeros(layout.total, dtype=torch.uint8)
        ops.quantize_on_write(planes, key, value, torch.arange(rows), rows)
        mark(planes, valid=True)
        scale, roundoff = key.shape[3] ** -0.5, UNIT_ROUNDOFF[key.dtype]
        output = read(query.float(), key, value, planes, None, None, rows, scale, 0.0, tolerance, roundoff, 0)
        errors.append(relative_error(output, exact_attention(query, key, value, scale)).flatten() / (float(KAPPA) * roundoff))
    return torch.stack(errors)


def _order(bytes_read: float, added: torch.Tensor) -> Order:
    rms = added.square().mean(1).sqrt()
    return Order(bytes_read, float(added.square().mean().sqrt()), float(added.flatten().quantile(0.99)), float(rms.max()))


def table(results: list[Comparison]) -> Table:
    """Both orders, a line each."""
    found = Table(box=box.SIMPLE_HEAD, title="bytes, and added error in units of the output's rounding error")
    for head in ("context", "order", "bytes", "added rms", "p99", "worst layer", "candidates", "pairs streamed", "programs"):
        found.add_column(head, justify="right")
    for one in results:
        for name, order in (("CPU", one.cpu), ("GPU", one.gpu)):
            errors = [f"{x:.2f}" for x in (order.added_rms, order.added_p99, order.added_worst)]
            gave_up = f"{one.pairs_unread} + {one.pairs_misjudged} of {one.pairs}", str(one.shares_streamed)
            extra = [f"{one.candidates:.1%}", *gave_up] if name == "GPU" else ["", "", ""]
            found.add_row(str(one.context), name, f"{order.bytes:.1%}", *errors, *extra)
    return found


def main(
    text: Annotated[str, typer.Option(help="A text of `alignedkv eval`.")] = "code",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    contexts: Annotated[str, typer.Option(help="Cache rows, the decoded token's included; at most 8000.")] = "2048,4096,8000",
    tolerance: Annotated[float, typer.Option(help="Of the read.")] = 2.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Both orders of steps on real K and V."""
    console = open_console()
    sha256, steps = decode_steps(text, dtype, contexts, console)
    results = [compare(context, layers, tolerance) for context, layers in steps]
    console.print(table(results))
    if json_path is not None:
        saved: dict[str, Any] = {"text": text, "sha256": sha256, "dtype": dtype, "tolerance": tolerance}
        json_path.parent.mkdir(parents=True, exist_ok=True)
        saved |= {"environment": asdict(describe()), "contexts": [asdict(one) for one in results]}
        json_path.write_text(json.dumps(saved, indent=2) + "\n")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
