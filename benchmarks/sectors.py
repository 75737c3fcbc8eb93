"""Count the 32-byte sectors that the generated Triton kernels load, on real K and V, with no GPU.

    python benchmarks/capture.py results/smollm2-2048.pt --context 2048
    python benchmarks/sectors.py results/smollm2-2048.pt results/smollm2-7936.pt --json results/sectors.json

A GPU fetches memory in sectors of 32 bytes. The kernels that Inductor emits run in Triton's interpreter, where every load's
addresses are seen; the same operator at tolerance 0, a 16-bit flash-decoding kernel, is counted the same way. Three counts:

* *cache and planes*: distinct sectors of K, V and the plane arena in one call: what must come from memory at least once;
* *with scratch*: also the scores, flags and sums that the kernels hand to each other, distinct per call. They are a few
  bytes per row and would stay in the L2 cache of a GPU, but a count is not a measurement;
* *kernel by kernel*: each kernel's distinct sectors added up, as if no cache held anything between two kernels.

No GPU has run or timed any of this. The predictions are bytes over the bandwidth of the data sheets, and nothing more.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # triton's own default, without its warning

import numpy as np
import rich
import rich.table
import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "triton"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "kernel"))

from triton.runtime import interpreter
from triton_cases import to_row_order
from triton_interpreter import interpreted

from alignedkv_compile import lowering, ops
from alignedkv_compile.arena import mark
from alignedkv_compile.layout import arena_layout
from alignedkv_compile.options import UNIT_ROUNDOFF

SECTOR = 32
BANDWIDTH = {"A100 80 GB": 2039e9, "H100 SXM": 3350e9, "MI300X": 5300e9}
"""Bytes per second of the vendors' data sheets."""


@dataclass
class Loads:
    """Sectors loaded, by kernel launch: the numbers of the sectors, each once."""

    launches: list[np.ndarray] = field(default_factory=list)

    def distinct(self, ranges: list[tuple[int, int]] | None = None) -> int:
        """Bytes of the distinct sectors of all launches, of those inside ``ranges`` of addresses only if given."""
        sectors = np.unique(np.concatenate(self.launches))
        if ranges is not None:
            inside = np.zeros(len(sectors), dtype=bool)
            for begin, end in ranges:
                inside |= (sectors >= begin // SECTOR) & (sectors < -(-end // SECTOR))
            sectors = sectors[inside]
        return len(sectors) * SECTOR

    def added_up(self) -> int:
        """Bytes of each launch's distinct sectors, summed."""
        return sum(map(len, self.launches)) * SECTOR


@contextmanager
def watched() -> Iterator[Loads]:
    """Every load that the interpreter makes inside is noted."""
    loads, pieces = Loads(), []  # type: tuple[Loads, list[np.ndarray]]
    load, launch = interpreter.InterpreterBuilder.create_masked_load, interpreter.GridExecutor.__call__

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        addresses = np.asarray(pointers.data)[np.asarray(mask.data, dtype=bool)]
        pieces.append(np.unique(addresses // SECTOR))
        return load(self, pointers, mask, *rest)

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        pieces.clear()
        result = launch(self, *arguments, **options)
        loads.launches.append(np.unique(np.concatenate(pieces)) if pieces else np.empty(0, dtype=np.uint64))
        return result

    interpreter.InterpreterBuilder.create_masked_load = create_masked_load
    interpreter.GridExecutor.__call__ = call
    try:
        yield loads
    finally:
        interpreter.InterpreterBuilder.create_masked_load = load
        interpreter.GridExecutor.__call__ = launch


@dataclass(frozen=True)
class Count:
    """Bytes in one decode step, the chosen layers together."""

    context: int
    dtype: str
    tolerance: float
    rows: int
    cache_and_planes: int
    with_scratch: int
    kernel_by_kernel: int
    rows_counted: int


def read(function: Callable[..., torch.Tensor], layer: dict[str, torch.Tensor], tolerance: float) -> tuple[list[int], int]:
    """One layer's read: the three counts of its loads, in bytes, and the bytes that its own counters state."""
    query, key, value = layer["query"], layer["key"], layer["value"]
    rows, layout = key.shape[2], arena_layout(key, value)
    planes = torch.zeros(layout.total, dtype=torch.uint8)
    if tolerance > 0:  # written by the reference: interpreting the write takes longer than everything else
        ops.quantize_on_write(planes, key, value, torch.arange(rows), rows)
        mark(planes, valid=True)
        planes = to_row_order(planes, layout)
    counters = torch.zeros(1, len(ops.COUNTER_FIELDS), dtype=torch.int64)
    with watched() as loads:
        options = (None, None, key.shape[2], key.shape[3] ** -0.5, 0.0, tolerance, UNIT_ROUNDOFF[key.dtype], 512)
        function(query, key, value, planes, *options, counters, 0)
    ranges = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in (key, value, planes)]
    stated = int(counters[0, ops.COUNTER_FIELDS.index("bytes_read")])
    return [loads.distinct(ranges), loads.distinct(), loads.added_up()], stated


def count(path: Path, tolerance: float, layers: int | None) -> Count:
    """All layers of a capture, read at ``tolerance``."""
    found = torch.load(path)
    totals, stated = [0, 0, 0], 0
    number = len(found["key"])
    chosen = range(number) if layers is None else sorted({round(i * (number - 1) / max(layers - 1, 1)) for i in range(layers)})

    def attention(*arguments: object) -> torch.Tensor:
        return ops.aligned_read_attention.counted(*arguments)

    lowering.register()
    with interpreted():
        compiled = torch.compile(attention, fullgraph=True)
        for index in chosen:
            query, key, value = (found[name][index] for name in ("query", "key", "value"))
            bytes_, by_rows = read(compiled, {"query": query, "key": key, "value": value}, tolerance)
            totals = [a + b for a, b in zip(totals, bytes_, strict=True)]
            stated += by_rows
    example = found["key"][0]
    rows = len(chosen) * example.shape[1] * example.shape[2]
    return Count(
        example.shape[2], str(example.dtype).removeprefix("torch."), tolerance, rows, totals[0], totals[1], totals[2], stated
    )


def main(
    captures: Annotated[list[Path], typer.Argument(help="files of capture.py")],
    tolerance: Annotated[float, typer.Option(help="of the aligned read")] = 2.0,
    layers: Annotated[int | None, typer.Option(help="only so many layers, spread evenly; all take hours")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the counts here too")] = None,
) -> None:
    """Sectors loaded by the aligned read and by the 16-bit kernel, on captured K and V."""
    counts = [(count(path, tolerance, layers), count(path, 0.0, layers)) for path in captures]
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps([[asdict(one) for one in pair] for pair in counts], indent=1))
    table = rich.table.Table("context", "dtype", "bytes loaded per token", "aligned", "16 bits", "ratio")
    names = ("cache_and_planes", "with_scratch", "kernel_by_kernel", "rows_counted")
    for aligned, full in counts:
        for name in names:
            left, right = getattr(aligned, name), getattr(full, name)
            title = name.replace("_", " ")
            table.add_row(str(aligned.context), aligned.dtype, title, f"{left:,}", f"{right:,}", f"{left / right:.3f}")
        for device, rate in BANDWIDTH.items():
            times = [one.cache_and_planes / rate * 1e6 for one in (aligned, full)]
            table.add_row(
                str(aligned.context), aligned.dtype, f"prediction, us at {device}'s bandwidth", *(f"{t:.1f}" for t in times), ""
            )
    rich.get_console().print(table)


if __name__ == "__main__":
    typer.run(main)
