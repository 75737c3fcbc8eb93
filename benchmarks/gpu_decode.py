"""Milliseconds per decoded token of :mod:`gpu_model`'s model: eager, ``torch.compile`` and this backend.

A compiled model repeats K and V for every query head before attention: transformers does so whenever there is a mask, as over
a StaticCache. Two more rows show what the same model takes without that.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import alignedkv_compile
from gpu_model import SPARE_ROWS, ModelShape, build, filled_cache, token_inputs, tokens_to_decode
from gpu_timing import Kernel, TemplateNames, kernel_times, synchronize

EAGER, COMPILED, ALIGNED = "eager", "torch.compile", "alignedkv"
GROUPED, UNMASKED = "torch.compile, SDPA enable_gqa", "torch.compile, SDPA enable_gqa, no mask"
DESCRIPTIONS = {
    EAGER: "model.forward",
    COMPILED: 'torch.compile(mode="reduce-overhead")',
    ALIGNED: 'torch.compile(backend="alignedkv", mode="reduce-overhead")',
    GROUPED: "torch.compile, transformers told not to repeat K and V; cuDNN's kernel forced, the one that takes a mask then",
    UNMASKED: "the same without the mask, torch's own choice of kernel: attends to unused rows too, so its logits are others",
}
KERNELS_KEPT = 24
"""Of each variant, in the JSON."""
DIFFERENCE_OF_COMPILE = 3.0
"""How many times further from eager than ``torch.compile`` logits may be."""
SMALLEST_DIFFERENCE = 0.01
"""Relative difference from eager that is never wrong: what bfloat16 costs the model by itself."""


@dataclass(frozen=True)
class Decoded:
    """One variant; without times it was not run, and ``not_run`` says why.

    Attributes:
        milliseconds: per token, after the first ones.
        first_seconds: of the first token, compilation and planes included.
        logits: of one token, on the CPU.
        kernels: per token, slowest first.
        report: of this backend: which attention calls it rewrote.
    """

    milliseconds: tuple[float, ...] = ()
    first_seconds: float = 0.0
    logits: torch.Tensor | None = None
    kernels: list[Kernel] = field(default_factory=list)
    report: str = ""
    not_run: str = ""


@contextlib.contextmanager
def variant(name: str, model: Any) -> Iterator[Callable[..., Any]]:
    """The forward of one variant, ready to be called while the context lasts."""
    from transformers.integrations import sdpa_attention

    torch.compiler.reset()
    alignedkv_compile.reset_report()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.compiler.reset)  # its CUDA graphs hold memory
        if name in (GROUPED, UNMASKED):  # the only switch in some releases is this function
            stack.enter_context(patch.object(sdpa_attention, "use_gqa_in_sdpa", lambda *_, **__: True))
        if name == GROUPED:
            stack.enter_context(sdpa_kernel(SDPBackend.CUDNN_ATTENTION))
        if name == UNMASKED:
            _register_unmasked()
            model.set_attn_implementation("bench_unmasked")
            stack.callback(model.set_attn_implementation, "sdpa")
        if name == EAGER:
            yield model.forward
        else:
            backend = "alignedkv" if name == ALIGNED else "inductor"
            yield torch.compile(model.forward, backend=backend, mode="reduce-overhead")


def _register_unmasked() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations import sdpa_attention

    def attend(module: Any, query: Any, key: Any, value: Any, _mask: Any, **options: Any) -> Any:
        return sdpa_attention.sdpa_attention_forward(module, query, key, value, None, **options)

    AttentionInterface.register("bench_unmasked", attend)
    AttentionMaskInterface.register("bench_unmasked", lambda *_, **__: None)


@torch.no_grad()
def decode(
    name: str, model: Any, shape: ModelShape, batch: int, device: torch.device, tokens: int, warm: int = 6, profiled: int = 2
) -> Decoded:
    """Decode ``warm + tokens + profiled`` tokens; those in the middle are timed, the last ones profiled."""
    tokens = min(tokens, SPARE_ROWS - warm - profiled)
    cache, ids = filled_cache(model, shape, batch, device), tokens_to_decode(shape, batch, device)
    prepared = [token_inputs(ids, index, shape) for index in range(warm + tokens + profiled)]
    logits = torch.empty(0)
    with variant(name, model) as forward:

        def step(index: int) -> float:
            """Milliseconds of one token, the host's share included."""
            nonlocal logits
            torch.compiler.cudagraph_mark_step_begin()
            synchronize(device)
            start = time.perf_counter()
            logits = forward(**prepared[index], past_key_values=cache).logits
            synchronize(device)
            return 1000 * (time.perf_counter() - start)

        with TemplateNames() as templates:
            first, *_ = [step(index) for index in range(warm)]
        checked = logits.float().cpu()
        milliseconds = tuple(step(index) for index in range(warm, warm + tokens))
        last = range(warm + tokens, warm + tokens + profiled)
        kernels = kernel_times(lambda: [step(index) for index in last], profiled, device, templates.found) if profiled else []
        about = str(alignedkv_compile.report()) if name == ALIGNED else ""
    return Decoded(milliseconds, first / 1000, checked, kernels, about)


def compile_variant(name: str, shape: ModelShape, batch: int, device: torch.device) -> None:
    """Compile what :func:`decode` does, into Inductor's cache."""
    decode(name, build(shape, device), shape, batch, device, tokens=0, warm=1, profiled=0)


def free_memory() -> None:
    """Give back what the last variant held."""
    gc.collect()
    with contextlib.suppress(RuntimeError):  # a kernel that broke the context has been reported where it ran
        torch.cuda.empty_cache()


def batch_entry(
    batch: int, shape: ModelShape, effective_keys: list[float], decoded: dict[str, Decoded], target: float | None
) -> dict[str, Any]:
    """One batch size as JSON, with ratios to ``torch.compile``."""
    medians = {name: statistics.median(found.milliseconds) for name, found in decoded.items() if found.milliseconds}
    differences = _differences(decoded)
    most = max(SMALLEST_DIFFERENCE, DIFFERENCE_OF_COMPILE * differences.get(COMPILED, 0.0))
    entries = {}
    for name, found in decoded.items():
        if name not in medians:
            entries[name] = {"not_run": found.not_run, "wrong": False}
            continue
        times = medians[COMPILED] / medians[name] if COMPILED in medians else None
        difference = differences.get(name)
        entry: dict[str, Any] = {
            "median_ms": medians[name],
            "min_ms": min(found.milliseconds),
            "max_ms": max(found.milliseconds),
            "first_s": found.first_seconds,
            "times_compile": times,
            "difference": difference,
            "wrong": difference is not None and name not in (COMPILED, UNMASKED) and not difference <= most,
            "kernels": [asdict(kernel) for kernel in found.kernels[:KERNELS_KEPT]],
            **({"report": found.report} if found.report else {}),
        }
        if name == ALIGNED and target is not None:
            entry |= {"target_times_compile": target, "met": times is not None and times >= target and not entry["wrong"]}
        entries[name] = entry
    keys = {"mean": statistics.mean(effective_keys), "least": min(effective_keys), "most": max(effective_keys)}
    return {
        "case": f"model b{batch} x {shape.context}",
        "batch": batch,
        "context": shape.context,
        "layers": shape.layers,
        "effective_keys": keys,
        "variants": entries,
    }


def _differences(decoded: dict[str, Decoded]) -> dict[str, float]:
    """``||logits - eager|| / ||eager||`` by variant."""
    reference = decoded[EAGER].logits if EAGER in decoded else None
    if reference is None:
        return {}
    return {
        name: float((found.logits - reference).norm() / reference.norm())
        for name, found in decoded.items()
        if found.logits is not None and name != EAGER
    }
