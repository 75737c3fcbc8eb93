"""The attention operator alone: aligned reads against SDPA and against streaming the whole cache.

    python benchmarks/attention.py --quick
    python benchmarks/attention.py --contexts 1024,16384 --shapes 32/8/128 --dtypes bfloat16
    python benchmarks/capture.py results/smollm2.pt && python benchmarks/attention.py --kv results/smollm2.pt

Every call is one decode step of one layer. A model reads another layer's cache at each call, so no cache is warm when its turn
comes: the benchmark keeps copies of K, V and planes until they take ``--footprint-mib`` together and goes round them.
Variants take turns in every round, in an order drawn anew, since a turn is not independent of whose was before it; medians over
rounds are reported.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

from alignedkv_compile.break_even import ReadShape
from alignedkv_compile.cost import priced
from alignedkv_compile.demo.console import open_console
from alignedkv_compile.demo.environment import describe
from alignedkv_compile.ops import COUNTER_FIELDS
from alignedkv_compile.options import Options
from attention_inputs import (
    EFFECTIVE_KEYS,
    INDEPENDENT,
    MODEL,
    Layer,
    Shape,
    captured,
    effective_keys,
    exact_attention,
    layer_of,
    parse_inputs,
)
from attention_report import SHORT_DTYPE, Case, Measured, derived, markdown, ratio_table, time_table
from attention_variants import ALIGNED, DEFAULT, DESCRIPTIONS, Call, Prepared, default_call, make_calls, prepare, settle

CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
SHAPES = ("32/8/128", "32/32/128", "9/3/64")
DTYPES = tuple(SHORT_DTYPE)
QUICK_CASES = (("32/8/128", 16384, "bfloat16"), ("9/3/64", 16384, "float32"))
MAX_COPIES = 64


@dataclass(frozen=True)
class Plan:
    """How to measure; see the command's options."""

    rounds: int
    burst_ms: float
    footprint_mib: float
    tolerance: float
    accuracy: torch.dtype | None
    inputs: str
    effective_keys: float
    max_gib: float


@dataclass(frozen=True)
class Default:
    """What a model with such layers does by default on this machine, see :class:`Case`."""

    least_context: int
    break_even: float


def measure(layers: Sequence[Layer], calls: dict[str, Call], plan: Plan, default: Default) -> Case:
    """Time every variant in turns over ``layers`` (all of one shape)."""
    prepared = [prepare(layer) for layer in layers]
    for item in prepared:
        settle(item, calls[DEFAULT])
    shape, context = layers[0].shape, layers[0].context
    exact = exact_attention(layers[0])
    errors, bursts = {}, {}
    for name, call in calls.items():
        errors[name] = float((call(prepared[0]).double() - exact).norm() / exact.norm())
        bursts[name] = burst_of(call, prepared, plan.burst_ms)
    for item in prepared:
        item.counters.zero_()
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    draw = random.Random(0)
    for _ in range(plan.rounds):
        for name in draw.sample(names, len(names)):
            rounds[name].append(time_calls(calls[name], prepared, bursts[name]))
    bytes_read = {name: float(layers[0].bytes_full) for name in names}
    for row, name in ((0, ALIGNED), (2, DEFAULT)):
        counted = torch.stack([item.counters[row] for item in prepared]).sum(0).tolist()
        totals = dict(zip(COUNTER_FIELDS, counted, strict=True))
        bytes_read[name] = totals["bytes_read"] / totals["calls"]
    variants = {name: summarize(rounds[name], errors[name], bytes_read[name], layers[0]) for name in names}
    keys = statistics.mean(effective_keys(layer) for layer in layers)
    dtype = str(layers[0].key.dtype).removeprefix("torch.")
    return Case(
        str(shape),
        context,
        dtype,
        keys,
        len(layers),
        least_context=default.least_context,
        break_even=default.break_even,
        variants=variants,
    )


def summarize(rounds: Sequence[float], error: float, bytes_read: float, layer: Layer) -> Measured:
    """A variant's figures.

    Args:
        rounds: mean milliseconds per call of each round.
        error: relative, against float64.
        bytes_read: per call.
        layer: what was read.
    """
    median, rows = statistics.median(rounds), layer.context * layer.shape.heads
    return Measured(
        median_ms=median,
        min_ms=min(rounds),
        rounds_ms=tuple(rounds),
        relative_error=error,
        bytes_read=bytes_read,
        bytes_fraction=bytes_read / layer.bytes_full,
        bytes_per_row=bytes_read / rows,
        ns_per_row=1e6 * median / rows,
        gb_per_s=bytes_read / median / 1e6,
    )


def time_calls(call: Call, prepared: Sequence[Prepared], count: int) -> float:
    """Mean milliseconds of ``count`` calls, going round the layers."""
    start = time.perf_counter()
    for index in range(count):
        call(prepared[index % len(prepared)])
    return 1000 * (time.perf_counter() - start) / count


def burst_of(call: Call, prepared: Sequence[Prepared], burst_ms: float) -> int:
    """Calls per turn: as many as fit into ``burst_ms``, but each layer at most once per turn for slow variants."""
    time_calls(call, prepared, 1)
    return max(1, int(burst_ms / max(time_calls(call, prepared, min(3, len(prepared))), 1e-6)))


@contextmanager
def empty_inductor_cache() -> Iterator[None]:
    """Inductor finds nothing that it compiled before: the operators' templates are not part of its own cache key."""
    with tempfile.TemporaryDirectory(prefix="alignedkv-bench-", ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        yield


def copies_of(layer: Layer, footprint_mib: float) -> list[Layer]:
    """Enough copies that their K and V take ``footprint_mib``, at most :data:`MAX_COPIES`."""
    count = min(MAX_COPIES, max(1, int(footprint_mib * 2**20 // layer.bytes_full)))
    return [layer] + [layer.clone() for _ in range(count - 1)]


def needed_gib(shape: Shape, context: int, dtype: torch.dtype, footprint_mib: float) -> float:
    """Rough peak memory of a case: copies with planes, fp32 scores, and K and V repeated per query head."""
    cache = 2 * context * shape.heads * shape.head_dim * dtype.itemsize
    copies = max(cache, footprint_mib * 2**20)
    repeated = 2 * cache * shape.group
    return (1.6 * copies + repeated + 8 * context * shape.query_heads * 4) / 2**30


def default_of(shape: Shape, dtype: torch.dtype, plan: Plan) -> Default:
    """Measured if this machine has not yet."""
    options = Options(tolerance=plan.tolerance, accuracy=plan.accuracy)
    read = ReadShape(torch.device("cpu"), dtype, shape.heads, shape.group, shape.head_dim, shape.head_dim)
    measured = priced(options)
    return Default(measured.least_context(read), measured.break_even(read))


def calls_of(plan: Plan, default: Default) -> dict[str, Call]:
    """The variants by name."""
    calls = make_calls(plan.tolerance, plan.accuracy)
    return calls | {DEFAULT: default_call(plan.tolerance, plan.accuracy, default.least_context, default.break_even)}


def run_cases(
    cases: Sequence[tuple[str, int, str]], plan: Plan, defaults: Mapping[tuple[str, str], Default], console: Console
) -> Iterator[Case]:
    """Measure made-up cases; graphs are kept from one context to the next and dropped between shapes and dtypes."""
    calls: dict[str, Call] = {}
    compiled_for: tuple[str, str] | None = None
    for name, context, dtype_name in track(cases, "measuring", console=console):
        shape, dtype = parse_shape(name), parse_dtype(dtype_name)
        needed = needed_gib(shape, context, dtype, plan.footprint_mib)
        if needed > plan.max_gib:
            yield Case(
                name, context, dtype_name, skipped=f"needs about {needed:.1f} GiB of memory, --max-gib is {plan.max_gib:g}"
            )
            continue
        if compiled_for != (name, dtype_name):
            torch.compiler.reset()
            calls, compiled_for = calls_of(plan, defaults[name, dtype_name]), (name, dtype_name)
        layer = layer_of(plan.inputs, shape, context, dtype, plan.effective_keys)
        yield measure(copies_of(layer, plan.footprint_mib), calls, plan, defaults[name, dtype_name])


def parse_shape(text: str) -> Shape:
    try:
        query_heads, heads, head_dim = (int(part) for part in text.split("/"))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not query heads/KV heads/head dimension, such as 32/8/128") from None
    if min(query_heads, heads, head_dim) < 1 or query_heads % heads:
        raise typer.BadParameter(f"{text!r}: query heads must be a multiple of KV heads")
    return Shape(query_heads, heads, head_dim)


def parse_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(DTYPES)}")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]


def main(
    contexts: Annotated[str, typer.Option(help="Cache rows.")] = ",".join(map(str, CONTEXTS)),
    shapes: Annotated[str, typer.Option(help="Query heads/KV heads/head dimension.")] = ",".join(SHAPES),
    dtypes: Annotated[str, typer.Option(help="Of K, V and the query.")] = ",".join(DTYPES),
    quick: Annotated[bool, typer.Option("--quick", help="16k only: one bf16 and one fp32 case.")] = False,
    kv: Annotated[Path | None, typer.Option(help="Use the layers that benchmarks/capture.py saved.", exists=True)] = None,
    tolerance: Annotated[float, typer.Option(min=0.0, help="Of the aligned read.")] = 2.0,
    accuracy: Annotated[
        str | None, typer.Option(help="Dtype that the tolerance is measured in; the cache's if not given.")
    ] = None,
    inputs: Annotated[str, typer.Option(help=f"{MODEL}: made up like a model's. {INDEPENDENT}: numbers.")] = MODEL,
    keys: Annotated[float, typer.Option(min=1.0, help="Effective number of keys of independent inputs.")] = EFFECTIVE_KEYS,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every variant.")] = 15,
    burst_ms: Annotated[float, typer.Option(min=0.0, help="Length of a turn.")] = 50.0,
    footprint_mib: Annotated[float, typer.Option(min=0.0, help="Keep copies of K and V up to this size.")] = 512.0,
    max_gib: Annotated[float, typer.Option(min=0.1, help="Skip cases that need more memory.")] = 12.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch; its own default if not given.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all results to this file.")] = None,
    markdown_path: Annotated[Path | None, typer.Option("--markdown", help="Write one table to this file.")] = None,
) -> None:
    """Time the attention operator alone, in turns with stock attention. Run on an otherwise idle machine."""
    if threads is not None:
        torch.set_num_threads(threads)
    console = open_console()
    plan = Plan(
        rounds=rounds,
        burst_ms=burst_ms,
        footprint_mib=footprint_mib,
        tolerance=tolerance,
        accuracy=None if accuracy is None else parse_dtype(accuracy),
        inputs=parse_inputs(inputs) if kv is None else str(kv),
        effective_keys=keys,
        max_gib=max_gib,
    )
    grid = [(s, int(c), d) for d in dtypes.split(",") for s in shapes.split(",") for c in contexts.split(",")]
    cases: list[Case]
    if kv is not None:
        layers = captured(kv)
        default = default_of(layers[0].shape, layers[0].key.dtype, plan)
    else:
        wanted = QUICK_CASES if quick else grid
        kinds = {(name, dtype): (parse_shape(name), parse_dtype(dtype)) for name, _, dtype in wanted}
        defaults = {kind: default_of(*parsed, plan) for kind, parsed in kinds.items()}
    with empty_inductor_cache(), torch.no_grad():
        if kv is not None:
            cases = [measure(layers, calls_of(plan, default), plan, default)]
        else:
            cases = list(run_cases(wanted, plan, defaults, console))
    console.print(time_table(cases))
    console.print(ratio_table(cases))
    for name, description in DESCRIPTIONS.items():
        console.print(f"{name}: {description}")
    result = {
        "environment": asdict(describe()),
        "plan": asdict(plan) | {"accuracy": accuracy},
        "descriptions": DESCRIPTIONS,
        "cases": [asdict(case) | derived(case) for case in cases],
    }
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=2) + "\n")
        console.print(f"results: {json_path}")
    if markdown_path is not None:
        markdown_path.parent.mkdir(parents=True, exist_ok=True)
        markdown_path.write_text(markdown(cases), encoding="utf-8")
        console.print(f"table: {markdown_path}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
