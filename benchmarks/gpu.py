"""The generated Triton on a GPU: is it right, and how fast is it? For whoever has one; no GPU has run this program yet.

    python benchmarks/gpu.py                                     # correctness, the operator at 1k to 128k, JSON and plot
    python benchmarks/gpu.py --model HuggingFaceTB/SmolLM2-135M  # then a model's decode, end to end
    python benchmarks/gpu.py --quick                             # correctness and two contexts

Correctness comes first, against float64 on the same stored values; nothing is timed when it fails. Times are medians of
Triton's ``do_bench``, which flushes the L2 cache between calls.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import rich
import rich.table
import torch
import typer
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from alignedkv_compile import lowering
from alignedkv_compile.layout import arena_layout
from alignedkv_compile.ops import COUNTER_FIELDS, aligned_read_attention
from alignedkv_compile.options import UNIT_ROUNDOFF
from alignedkv_compile.rebuild import PLANE_BUILDER
from attention_inputs import EFFECTIVE_KEYS, Layer, Shape, exact_attention, synthetic

CONTEXTS = tuple(1024 << step for step in range(8))
SHAPES = (Shape(32, 8, 128), Shape(9, 3, 64), Shape(8, 1, 256))
ERROR_OVER_TOLERANCE = 6.0
"""Largest error of one output row, in units of tolerance times its rounding error, that the interpreter's tests allow too."""


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of one operator call, and the share of the cache's bytes that it read by its own counters."""

    shape: str
    context: int
    dtype: str
    variant: str
    milliseconds: float
    bytes_read: float | None = None


def refuse_without_gpu() -> torch.device:
    """The GPU, or an exit that says what is missing."""
    if not torch.cuda.is_available():
        Console(stderr=True).print(
            "[red]error:[/] this benchmark needs a CUDA or ROCm GPU, and torch finds none"
            f" (torch {torch.__version__}, built for CUDA {torch.version.cuda}, ROCm {torch.version.hip}).\n"
            "Without one, `make gpu-codegen` compiles the kernels and benchmarks/sectors.py counts what they load.",
            highlight=False,
        )
        raise typer.Exit(1)
    return torch.device("cuda", torch.cuda.current_device())


def variants(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tolerance: float) -> dict[str, Callable[[], Any]]:
    """What is compared, by name; each takes no arguments and returns ``[1, Hq, 1, D]``. Compiles lazily."""
    from torch.nn.attention.flex_attention import flex_attention

    planes = torch.zeros(arena_layout(key, value).total, dtype=torch.uint8, device=key.device)
    PLANE_BUILDER.rebuild(planes, key, value, key.shape[2])
    scale, unit = key.shape[3] ** -0.5, UNIT_ROUNDOFF[key.dtype]

    def read(alpha: float) -> Callable[[], torch.Tensor]:
        def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
            return aligned_read_attention.default(query, key, value, planes, None, key.shape[2], scale, alpha, unit, 1)

        compiled = torch.compile(call, fullgraph=True, mode="max-autotune-no-cudagraphs")
        return lambda: compiled(query, key, value, planes)

    compiled_sdpa = torch.compile(lambda q, k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True), fullgraph=True)
    compiled_flex = torch.compile(lambda q, k, v: flex_attention(q, k, v, enable_gqa=True), fullgraph=True)

    def flash() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(query, key, value, enable_gqa=True)

    return {
        "aligned": read(tolerance),
        "stream": read(0.0),
        "sdpa flash": flash,
        "flex_attention": lambda: compiled_flex(query, key, value),
        "torch.compile": lambda: compiled_sdpa(query, key, value),
    }


def check(shape: Shape, dtype: torch.dtype, context: int, tolerance: float, device: torch.device) -> None:
    """Stop unless the aligned and the streaming read are right on this GPU."""
    layer = synthetic(shape, context, dtype, EFFECTIVE_KEYS)
    query, key, value = (tensor.to(device) for tensor in (layer.query, layer.key, layer.value))
    calls, wanted = variants(query, key, value, tolerance), exact_attention(Layer(query, key, value))
    unit = UNIT_ROUNDOFF[dtype]
    for name, allowed in (("stream", 0.0), ("aligned", tolerance)):
        error = (calls[name]().double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        bound = (ERROR_OVER_TOLERANCE * allowed * 0.4247 + 2.0) * unit
        if not bool((error <= bound).all()):
            raise SystemExit(f"wrong on this GPU: {name} {shape} {dtype} at {context}: {float(error.max()):.2e} > {bound:.2e}")


def bytes_read(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tolerance: float) -> float:
    """Share of the cache's bytes that the aligned read states to have read."""
    planes = torch.zeros(arena_layout(key, value).total, dtype=torch.uint8, device=key.device)
    PLANE_BUILDER.rebuild(planes, key, value, key.shape[2])
    counters = torch.zeros(1, len(COUNTER_FIELDS), dtype=torch.int64, device=key.device)
    options = (None, key.shape[2], key.shape[3] ** -0.5, tolerance, UNIT_ROUNDOFF[key.dtype], 1)
    torch.compile(aligned_read_attention.counted, fullgraph=True)(query, key, value, planes, *options, counters, 0)
    counted = dict(zip(COUNTER_FIELDS, counters[0].tolist(), strict=True))
    return counted["bytes_read"] / counted["bytes_full"]


def time_operator(contexts: tuple[int, ...], dtype: torch.dtype, tolerance: float, device: torch.device) -> list[Timing]:
    """Medians of every variant that runs at all."""
    from triton.testing import do_bench

    timings = []
    for shape in SHAPES:
        torch.compiler.reset()
        for context in contexts:
            layer = synthetic(shape, context, dtype, EFFECTIVE_KEYS)
            query, key, value = (tensor.to(device) for tensor in (layer.query, layer.key, layer.value))
            share = bytes_read(query, key, value, tolerance)
            for name, call in variants(query, key, value, tolerance).items():
                try:
                    call()
                    milliseconds = float(do_bench(call, return_mode="median"))
                except RuntimeError as error:  # a backend that has no kernel for this shape
                    rich.print(f"{name} does not run for {shape} at {context}: {str(error).splitlines()[0]}")
                    continue
                entry = Timing(str(shape), context, str(dtype), name, milliseconds, share if name == "aligned" else None)
                timings.append(entry)
    return timings


@torch.no_grad()
def time_model(name: str, context: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of a decoded token after ``context`` random ones, by variant."""
    from transformers import AutoModelForCausalLM, StaticCache

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).to(device).eval()
    tokens = torch.randint(0, model.config.vocab_size, (1, context), device=device)
    forwards = {
        "eager": model.forward,
        "torch.compile": torch.compile(model.forward, mode="reduce-overhead"),
        "alignedkv": torch.compile(model.forward, backend="alignedkv", mode="reduce-overhead"),
    }
    medians = {}
    for variant, forward in forwards.items():
        cache = StaticCache(model.config, max_cache_len=context + 64)
        for start in range(0, context, 1024):
            model(input_ids=tokens[:, start : start + 1024], past_key_values=cache)
        durations = []
        for _ in range(24):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            forward(input_ids=tokens[:, :1], past_key_values=cache)
            torch.cuda.synchronize()
            durations.append(1e3 * (time.perf_counter() - begin))
        medians[variant] = statistics.median(durations[8:])
    return medians


def plot(timings: list[Timing], path: Path) -> None:
    """Milliseconds over context, one panel per shape."""
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(entry.shape for entry in timings))
    figure, axes = plt.subplots(1, len(shapes), figsize=(5 * len(shapes), 4), squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        for variant in dict.fromkeys(entry.variant for entry in timings):
            chosen = [entry for entry in timings if entry.shape == shape and entry.variant == variant]
            axis.loglog([entry.context for entry in chosen], [entry.milliseconds for entry in chosen], "o-", label=variant)
        axis.set(title=shape, xlabel="context", ylabel="ms")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path)


def main(
    quick: Annotated[bool, typer.Option(help="two contexts only")] = False,
    tolerance: Annotated[float, typer.Option(help="of the aligned read")] = 2.0,
    model: Annotated[str | None, typer.Option(help="a Hugging Face model to decode with, end to end")] = None,
    model_context: Annotated[int, typer.Option(help="tokens before the decoded ones")] = 16384,
    json_path: Annotated[Path, typer.Option("--json", help="where the figures go; the plot beside it")] = Path(
        "results/gpu.json"
    ),
) -> None:
    """Check, then time, the generated Triton on this machine's GPU."""
    device = refuse_without_gpu()
    lowering.register()
    contexts = (4096, 32768) if quick else CONTEXTS
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float16):
            check(shape, dtype, 4096, tolerance, device)
    rich.print("correct: every shape, bfloat16 and float16")
    timings = time_operator(contexts, torch.bfloat16, tolerance, device)
    table = rich.table.Table("heads q/kv/dim", "context", "variant", "ms", "bytes read")
    for entry in timings:
        share = "" if entry.bytes_read is None else f"{entry.bytes_read:.1%}"
        table.add_row(entry.shape, str(entry.context), entry.variant, f"{entry.milliseconds:.4f}", share)
    rich.print(table)
    decode = time_model(model, model_context, device) if model else {}
    for variant, milliseconds in decode.items():
        rich.print(f"{model} after {model_context} tokens, {variant}: {milliseconds:.2f} ms per token")
    environment = {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
    }
    json_path.parent.mkdir(parents=True, exist_ok=True)
    json_path.write_text(
        json.dumps({**environment, "operator": [asdict(entry) for entry in timings], "model": decode}, indent=1)
    )
    plot(timings, json_path.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
