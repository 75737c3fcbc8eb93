"""The certified read on real K and V: what it reads, what it certifies, what the error is, and what the bound costs in time.

    python benchmarks/capture.py results/code-8000.pt --context 8000 --dtype bfloat16
    python benchmarks/certificate.py results/code-8000.pt --json results/certificate.json
    python benchmarks/certificate.py results/code-8000.pt --lossless

One decode step of every layer, from the generated kernel. A certificate bounds the error of a query head's output, in units of
the unit roundoff times the output's norm, as ``tolerance`` does with ``guarantee="worst_case"``. Times are medians over rounds
in which the certified read, the aligned read (``guarantee="expected"``, tolerance 2), streaming the cache and eager SDPA take
turns, going round the layers, so that no cache is warm when its turn comes.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.progress import track
from rich.table import Table

from alignedkv_compile.arena_memory import zeroed_arena
from alignedkv_compile.cache import rows as cache_rows
from alignedkv_compile.demo.console import open_console
from alignedkv_compile.demo.environment import describe
from alignedkv_compile.layout import ArenaLayout
from alignedkv_compile.ops import COUNTER_FIELDS, certified_packed_read_attention, certified_read_attention
from alignedkv_compile.options import UNIT_ROUNDOFF
from alignedkv_compile.storage import LOSSLESS
from attention import burst_of, empty_inductor_cache, time_calls
from attention_inputs import captured, exact_attention
from attention_variants import ALIGNED, PACKED, STREAM, Call, Prepared, make_calls, prepare

TOLERANCES = "2,4,8,16,32,64"
EXPECTED_TOLERANCE = 2.0


@dataclass(frozen=True)
class Point:
    """The certified read at one tolerance, over all query heads of all layers.

    Attributes:
        tolerance: the bound that was asked for.
        bytes_fraction: read, of the cache in its own dtype.
        certified: fraction of query heads of which bits were left out; the others were streamed and have no error to bound.
        median, worst: certificate among them.
        error_median, error_worst: actual error before rounding to the cache's dtype, in the same units.
        tightest: largest error over its certificate.
        violations: query heads whose error exceeds their certificate.
        ms, aligned_ms, stream_ms, packed_ms: median per call and layer.
    """

    tolerance: float
    bytes_fraction: float
    certified: float
    median: float
    worst: float
    error_median: float
    error_worst: float
    tightest: float
    violations: int
    ms: float
    aligned_ms: float
    stream_ms: float
    packed_ms: float


def certified_call(tolerance: float, bounds: torch.Tensor) -> Call:
    """The certified read of planes beside a cache, whose certificates go to ``bounds``, float32 ``[1, 2, Hq]``."""

    @torch.compile(fullgraph=True)
    def certified(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        planes: torch.Tensor,
        bounds: torch.Tensor,
        counters: torch.Tensor,
    ) -> torch.Tensor:
        unit, scale, context = UNIT_ROUNDOFF[key.dtype], key.shape[3] ** -0.5, key.shape[2]
        read = certified_read_attention.counted
        return read(query, key, value, planes, None, None, context, scale, 0.0, tolerance, unit, 1, bounds, counters, 0)

    return lambda p: certified(p.layer.query, p.layer.key, p.layer.value, p.planes, bounds, p.counters)


def certified_lossless_call(tolerance: float, bounds: torch.Tensor, prepared: Sequence[Prepared]) -> Call:
    """The same of lossless caches that hold what the layers of ``prepared`` do."""
    shape, context = prepared[0].layer.shape, prepared[0].layer.context
    dim, dtype = shape.head_dim, prepared[0].layer.key.dtype
    layout = ArenaLayout(shape.heads, context, dim, dim, LOSSLESS, dtype.itemsize)
    arenas = {}
    for item in prepared:
        arena = arenas[item.planes.data_ptr()] = zeroed_arena(layout.total, item.planes.device)
        cache_rows.store(arena, item.layer.key, item.layer.value, torch.arange(context), context, LOSSLESS.name)

    @torch.compile(fullgraph=True)
    def certified(query: torch.Tensor, planes: torch.Tensor, bounds: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
        held = (shape.heads, dim, dtype, LOSSLESS.name, context, context)
        read = certified_packed_read_attention.counted
        return read(query, planes, None, None, *held, dim**-0.5, 0.0, tolerance, UNIT_ROUNDOFF[dtype], 1, bounds, counters, 0)

    return lambda p: certified(p.layer.query, arenas[p.planes.data_ptr()], bounds, p.counters)


def in_float32(prepared: Prepared) -> Prepared:
    """The same layer with a float32 query, so that the output is not rounded to the cache's dtype."""
    layer = prepared.layer
    return Prepared(type(layer)(layer.query.float(), layer.key, layer.value), prepared.mask, prepared.planes, prepared.counters)


def measure(prepared: Sequence[Prepared], tolerance: float, rounds: int, burst_ms: float, *, lossless: bool) -> Point:
    """One row of the table; ``lossless``: of lossless caches, beside the aligned read of planes next to a cache."""
    heads = prepared[0].layer.shape.query_heads
    bounds = torch.zeros(1, 2, heads)
    certified = certified_lossless_call(tolerance, bounds, prepared) if lossless else certified_call(tolerance, bounds)
    calls = {"certified": certified}
    every = make_calls(EXPECTED_TOLERANCE, None)
    calls |= {name: every[name] for name in (ALIGNED, STREAM, PACKED)}
    certificates, errors, read, full = [], [], 0, 0
    for item in prepared:
        item.counters.zero_()
        output = calls["certified"](in_float32(item)).double()
        certificates.append(bounds[0, 0].double())
        size = UNIT_ROUNDOFF[item.layer.key.dtype] * output.norm(dim=-1)
        errors.append(((output - exact_attention(item.layer)).norm(dim=-1) / size).flatten())
        counts = dict(zip(COUNTER_FIELDS, item.counters[0].tolist(), strict=True))
        read, full = read + counts["bytes_read"], full + counts["bytes_full"]
    certificate, error = torch.cat(certificates), torch.cat(errors)
    bounded = certificate > 0
    times: dict[str, list[float]] = {name: [] for name in calls}
    bursts = {name: burst_of(call, prepared, burst_ms) for name, call in calls.items()}
    for round_ in range(rounds):
        for turn in range(len(calls)):
            name = list(calls)[(round_ + turn) % len(calls)]
            times[name].append(time_calls(calls[name], prepared, bursts[name]))
    found = certificate[bounded] if bool(bounded.any()) else certificate.new_zeros(1)
    actual = error[bounded] if bool(bounded.any()) else error.new_zeros(1)
    return Point(
        tolerance=tolerance,
        bytes_fraction=read / full,
        certified=float(bounded.double().mean()),
        median=float(found.median()),
        worst=float(found.max()),
        error_median=float(actual.median()),
        error_worst=float(actual.max()),
        tightest=float((actual / found.clamp_min(1e-30)).max()),
        violations=int((actual > found).sum()),
        ms=statistics.median(times["certified"]),
        aligned_ms=statistics.median(times[ALIGNED]),
        stream_ms=statistics.median(times[STREAM]),
        packed_ms=statistics.median(times[PACKED]),
    )


def table(title: str, points: Sequence[Point]) -> Table:
    """All points."""
    found = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    columns = ["toler-\nance", "bytes", "heads", "bound\nmedian", "bound\nworst", "error\nmedian", "error\nworst"]
    for name in [*columns, "error/\nbound", "vio-\nlations", "ms", "/\nstream", "/\naligned", "/ SDPA\npacked"]:
        found.add_column(name, justify="right", no_wrap=True)
    for p in points:
        numbers = [f"{x:.2f}" for x in (p.median, p.worst, p.error_median, p.error_worst, p.tightest)]
        times = [f"{p.ms:.3f}", *(f"{p.ms / other:.2f}" for other in (p.stream_ms, p.aligned_ms, p.packed_ms))]
        found.add_row(f"{p.tolerance:g}", f"{p.bytes_fraction:.1%}", f"{p.certified:.0%}", *numbers, str(p.violations), *times)
    return found


def main(
    kv: Annotated[Path, typer.Argument(help="Layers that benchmarks/capture.py saved.", exists=True)],
    tolerances: Annotated[str, typer.Option(help="Bounds, in units of the roundoff times the output's norm.")] = TOLERANCES,
    rounds: Annotated[int, typer.Option(help="Rounds in which the three reads take turns.", min=1)] = 15,
    burst_ms: Annotated[float, typer.Option(help="Length of a turn.")] = 60.0,
    lossless: Annotated[bool, typer.Option("--lossless", help="Of a lossless cache instead of planes beside one.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write every number here.")] = None,
) -> None:
    """What the certified read reads and certifies on captured K and V, beside the aligned read and the stream."""
    console = open_console()
    try:
        layers = captured(kv)
        wanted = [float(text) for text in tolerances.split(",")]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    points = []
    with empty_inductor_cache(), torch.no_grad():
        prepared = [prepare(layer) for layer in layers]
        for tolerance in track(wanted, "measuring", console=console):
            torch.compiler.reset()
            points.append(measure(prepared, tolerance, rounds, burst_ms, lossless=lossless))
    dtype = str(layers[0].key.dtype).removeprefix("torch.")
    held = f"{kv.name}, lossless" if lossless else kv.name
    title = f"certified reads of {held}: {len(layers)} layers of {layers[0].shape}, {layers[0].context} rows, {dtype}"
    console.print(table(title, points))
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "environment": asdict(describe()),
            "kv": kv.name,
            "dtype": dtype,
            "context": layers[0].context,
            "lossless": lossless,
        }
        json_path.write_text(json.dumps(record | {"points": [asdict(p) for p in points]}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
