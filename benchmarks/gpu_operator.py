"""The attention operator alone on a GPU: this backend's reads beside SDPA and flex_attention, each checked before it counts.

One call is one layer's decode step over a cache of exactly the context's rows, without a mask: what suits every baseline best.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from alignedkv_compile import lowering, storage
from alignedkv_compile.break_even import ReadShape
from alignedkv_compile.layout import ArenaLayout, arena_layout
from alignedkv_compile.ops import COUNTER_FIELDS, aligned_read_attention, load_rows, packed_read_attention, store_rows
from alignedkv_compile.options import UNIT_ROUNDOFF, Options
from alignedkv_compile.plane_builder import PLANE_BUILDER
from attention_inputs import EFFECTIVE_KEYS, MODEL, Layer, Shape, exact_attention, layer_of
from gpu_timing import (
    Call,
    Captured,
    Inputs,
    Kernel,
    TemplateNames,
    Times,
    Walked,
    capture,
    copies_needed,
    in_turns,
    kernel_times,
    synchronize,
)

ALIGNED, LOSSLESS, STREAM, FLOOR, CUDNN, FLASH = "aligned", "lossless", "stream", "read only", "sdpa cudnn", "sdpa flash"
SDPA = (CUDNN, FLASH, "sdpa cudnn packed", "sdpa flash packed", "sdpa")
CUDA_ONLY = (FLOOR, *SDPA[:4])

DESCRIPTIONS = {
    ALIGNED: "this backend's read at the given tolerance",
    LOSSLESS: "the same over a lossless cache, which is nothing but planes",
    STREAM: "this backend's read at tolerance 0: all bits",
    CUDNN: "scaled_dot_product_attention(enable_gqa=True), cuDNN's kernel forced",
    FLASH: "the same, FlashAttention forced",
    "sdpa cudnn packed": "cuDNN's kernel, the query heads of a group as rows of one head",
    "sdpa flash packed": "the same, FlashAttention",
    "sdpa": "scaled_dot_product_attention(enable_gqa=True), torch's own choice",
    "flex_attention": "compiled, enable_gqa=True",
    FLOOR: "a kernel that reads K and V and computes nothing: the floor of 16 bits",
}

ERROR_OVER_TOLERANCE = 6.0
"""Largest error of one output row over tolerance times the rms rounding error; the interpreter's tests allow it too."""
RMS_ROUNDING = 0.4247
"""Rms rounding error of a row in unit roundoffs."""
OWN_ERROR = 2.0
"""Unit roundoffs that any 16-bit attention may be off by."""


LLAMA = Shape(32, 8, 128)


@dataclass(frozen=True)
class Case:
    """One decode step: sequences, rows of the cache, heads, and the dtype of query, K and V."""

    batch: int
    context: int
    shape: Shape = LLAMA
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        rows = f"{self.context // 1024}k" if self.context % 1024 == 0 else str(self.context)
        other = "" if (self.shape, self.dtype) == (LLAMA, "bfloat16") else f", {self.shape} {self.dtype}"
        return f"b{self.batch} x {rows}{other}"


CASES = (Case(1, 32768), Case(8, 32768), Case(1, 131072), Case(1, 8192), Case(1, 4096))
"""The most telling first: a run that ends early has them."""
QUICK_CASES = CASES[:2]
OTHER_CASES = (
    Case(1, 4096, LLAMA, "float16"),
    Case(2, 5000, Shape(9, 3, 64)),
    Case(1, 8192, Shape(8, 1, 256)),
    Case(1, 4096, Shape(32, 32, 128), "float16"),
)
"""Other heads, dtypes and lengths, for the sake of their errors."""
TINY_CASES = (Case(2, 1024, Shape(4, 2, 32)), Case(2, 640, Shape(4, 2, 32)))
"""For a CPU, where nothing but the program itself is tried out."""


@dataclass(frozen=True)
class Plan:
    """How to measure.

    Attributes:
        tolerance, min_context: of the aligned read; by default what ``torch.compile(backend="alignedkv")`` takes.
        repeats: samples per variant.
        variants: of :data:`DESCRIPTIONS`.
        profiled: those whose kernels are listed.
        inputs: "model" or "independent", as :mod:`attention_inputs` says.
    """

    tolerance: float = Options.tolerance
    min_context: int | None = Options.min_context
    repeats: int = 15
    variants: tuple[str, ...] = tuple(DESCRIPTIONS)
    profiled: tuple[str, ...] = (ALIGNED, LOSSLESS, STREAM, CUDNN, FLASH)
    inputs: str = MODEL


@dataclass(frozen=True)
class Measured:
    """One variant of one case; without ``times`` it was not run, and ``not_run`` says why.

    Attributes:
        error, mean_error: largest and mean error of an output row against float64, in unit roundoffs of the cache's dtype.
        wrong: the error is more than the variant may make; its times say nothing.
    """

    times: Times | None = None
    error: float | None = None
    mean_error: float | None = None
    wrong: bool = False
    not_run: str = ""
    kernels: list[Kernel] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """One case.

    Attributes:
        copies: of the inputs that calls went round.
        cache_bytes: of K and V.
        bytes_share: of them that the aligned read states to have read; None when it could not be counted,
        not_counted: and why.
    """

    case: Case
    copies: int
    cache_bytes: int
    bytes_share: float | None
    not_counted: str
    variants: dict[str, Measured]


def _shape_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> ReadShape:
    batch, heads, rows, dim = key.shape
    return ReadShape(key.device, key.dtype, batch * heads, query.shape[1] // heads, dim, value.shape[3], rows)


def read(tolerance: float, min_context: int | None = None) -> Call:
    """This backend's operator, compiled; the planes are not passed when every bit is read."""

    def call(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, planes: torch.Tensor, *_: torch.Tensor
    ) -> torch.Tensor:
        scale, unit = key.shape[3] ** -0.5, UNIT_ROUNDOFF[key.dtype]
        arena = planes if tolerance > 0 else None
        least = Options(min_context=min_context).least_context(_shape_of(query, key, value))
        options = (None, None, key.shape[2], scale, 0.0, tolerance, unit, least)
        return aligned_read_attention.default(query, key, value, arena, *options)

    return torch.compile(call, fullgraph=True)


def read_lossless(tolerance: float) -> Call:
    """The read of an arena that is the cache; of K and V only the shapes are looked at."""

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _: torch.Tensor, arena: torch.Tensor) -> torch.Tensor:
        heads, context, unit = key.shape[1], key.shape[2], UNIT_ROUNDOFF[key.dtype]
        cache = (heads, value.shape[3], key.dtype, storage.LOSSLESS.name, context, context)
        return packed_read_attention.default(query, arena, None, None, *cache, key.shape[3] ** -0.5, 0.0, tolerance, unit, 0)

    return torch.compile(call, fullgraph=True)


def variants(plan: Plan) -> dict[str, Call]:
    """What is compared, by name; takes query, key, value, planes, a lossless arena."""
    from torch.nn.attention.flex_attention import flex_attention

    flex = torch.compile(lambda query, key, value: flex_attention(query, key, value, enable_gqa=True), fullgraph=True)

    def grouped(backend: SDPBackend) -> Call:
        def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(query, key, value, enable_gqa=True)

        return call

    def packed(backend: SDPBackend) -> Call:
        def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            rows = query.view(query.shape[0], key.shape[1], -1, query.shape[3])
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(rows, key, value).reshape(query.shape)

        return call

    def floor(_query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        from gpu_bandwidth import read as read_only

        return read_only(key, value)

    return {
        ALIGNED: read(plan.tolerance, plan.min_context),
        LOSSLESS: read_lossless(plan.tolerance),
        STREAM: read(0.0),
        CUDNN: grouped(SDPBackend.CUDNN_ATTENTION),
        FLASH: grouped(SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn packed": packed(SDPBackend.CUDNN_ATTENTION),
        "sdpa flash packed": packed(SDPBackend.FLASH_ATTENTION),
        "sdpa": lambda query, key, value, *_: scaled_dot_product_attention(query, key, value, enable_gqa=True),
        "flex_attention": lambda query, key, value, *_: flex(query, key, value),
        FLOOR: floor,
    }


COMPILED = (ALIGNED, LOSSLESS, STREAM, "flex_attention")


def compile_case(case: Case, device: torch.device, plan: Plan) -> None:
    """Compile all that :func:`measure` does, into Inductor's cache."""
    inputs, calls = inputs_of(case, device, plan.inputs), variants(plan)
    bytes_share(inputs, plan)
    for name in COMPILED:
        if name in plan.variants and not (name == LOSSLESS and lacks_lossless(case, device)):
            calls[name](*inputs)
    synchronize(device)


def inputs_of(case: Case, device: torch.device, inputs: str) -> Inputs:
    """Query, key, value, planes, and an arena that is a lossless cache, empty where no kernel could read it.

    Raises:
        AssertionError: rows do not come out of that arena bit for bit.
    """
    lowering.register()
    keys = min(EFFECTIVE_KEYS, case.context / 4)
    layer = layer_of(inputs, case.shape, case.context, getattr(torch, case.dtype), keys, case.batch, device)
    planes = torch.zeros(arena_layout(layer.key, layer.value).total, dtype=torch.uint8, device=device)
    PLANE_BUILDER.rebuild(planes, layer.key, layer.value, case.context)
    arena = planes.new_empty(0) if lacks_lossless(case, device) else lossless(layer)
    return layer.query, layer.key, layer.value, planes, arena


def lacks_lossless(case: Case, device: torch.device) -> bool:
    """Whether no kernel writes and reads a lossless cache of this dtype."""
    return device.type != "cpu" and not storage.LOSSLESS.has_triton(getattr(torch, case.dtype), device)


def lossless(layer: Layer) -> torch.Tensor:
    """K and V as an arena that is the cache; some rows are looked at."""
    batch, heads, context, dim = layer.key.shape
    layout = ArenaLayout(batch * heads, context, dim, layer.value.shape[3], storage.LOSSLESS, layer.key.element_size())
    arena = torch.zeros(layout.total, dtype=torch.uint8, device=layer.key.device)
    positions = torch.arange(context, device=arena.device)

    def store(arena: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor) -> None:
        store_rows.default(arena, key, value, positions, key.shape[2], storage.LOSSLESS.name)

    torch.compile(store, fullgraph=True)(arena, layer.key, layer.value, positions)
    nothing, rows = positions[:0], min(context, 512)
    none = layer.key[:, :, :0], layer.value[:, :, :0]
    held = load_rows.default(arena, *none, nothing, rows, context, storage.LOSSLESS.name)
    assert torch.equal(held[0], layer.key[:, :, :rows]), "K does not come out of a lossless cache as it went in"
    assert torch.equal(held[1], layer.value[:, :, :rows]), "V does not come out of a lossless cache as it went in"
    return arena


def bytes_share(inputs: Inputs, plan: Plan) -> float:
    """Share of the cache's bytes that the aligned read states to have read."""
    query, key, value, planes, _ = inputs
    counters = torch.zeros(1, len(COUNTER_FIELDS), dtype=torch.int64, device=key.device)
    least = Options(min_context=plan.min_context).least_context(_shape_of(query, key, value))
    options = (None, None, key.shape[2], key.shape[3] ** -0.5, 0.0, plan.tolerance, UNIT_ROUNDOFF[key.dtype], least)
    torch.compile(aligned_read_attention.counted, fullgraph=True)(query, key, value, planes, *options, counters, 0)
    counted = dict(zip(COUNTER_FIELDS, counters[0].tolist(), strict=True))
    return counted["bytes_read"] / counted["bytes_full"]


def cloned(inputs: Inputs, copies: int) -> list[Inputs]:
    """``inputs`` and as many copies in memory of their own as make ``copies``."""
    return [inputs] + [tuple(tensor.clone() for tensor in inputs) for _ in range(copies - 1)]


def errors(output: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Each row's error in unit roundoffs of the output's dtype; NaN and Inf stay."""
    return (output.double() - exact).norm(dim=-1) / exact.norm(dim=-1) / UNIT_ROUNDOFF[output.dtype]


def allowed_error(tolerance: float) -> float:
    """Unit roundoffs that one output row may be off by."""
    return ERROR_OVER_TOLERANCE * RMS_ROUNDING * tolerance + OWN_ERROR


def reason(error: BaseException) -> str:
    """Why something was not run, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def measure(case: Case, device: torch.device, plan: Plan, has_time: Callable[[], bool]) -> Outcome:
    """Check and time every variant; one that fails, or for which no time is left, says so and stops none of the others."""
    torch.compiler.reset()
    first = inputs_of(case, device, plan.inputs)
    query, key, value, *_ = first
    exact = exact_attention(Layer(query, key, value))
    cache_bytes = 2 * key.numel() * key.element_size()
    copies = copies_needed(cache_bytes, sum(tensor.numel() * tensor.element_size() for tensor in first), device)
    everything = cloned(first, copies)
    share: float | None = None
    not_counted = ""
    try:
        share = bytes_share(first, plan)
    except Exception as error:
        not_counted = reason(error)

    calls = {name: call for name, call in variants(plan).items() if name in plan.variants}
    found = dict[str, Measured]()
    ready, names = dict[str, Captured | Walked](), dict[str, dict[str, str]]()
    for name, call in calls.items():
        if name in CUDA_ONLY and device.type != "cuda":
            found[name] = Measured(not_run="no CUDA")
        elif name == LOSSLESS and lacks_lossless(case, device):
            found[name] = Measured(not_run=f"no Triton for lossless rows of {case.dtype}")
        elif not has_time():
            found[name] = Measured(not_run="no time left")
        else:
            try:
                with TemplateNames() as templates:
                    ready[name] = capture(call, everything)
                names[name] = templates.found
            except Exception as error:  # a kernel that is not there for this shape, or does not compile
                found[name] = Measured(not_run=reason(error))
                synchronize(device)
    times = in_turns(ready, plan.repeats)
    outputs = {name: ready[name].output.clone() for name in ready}
    ready.clear()
    for name, taken in times.items():
        found[name] = _judged(name, taken, outputs[name], exact, plan.tolerance)
    if has_time():
        for name in times:
            if name in plan.profiled:
                kernels = kernel_times(_all_over(calls[name], everything), copies, device, names[name])
                found[name] = replace(found[name], kernels=kernels)
    return Outcome(case, copies, cache_bytes, share, not_counted, {name: found[name] for name in calls})


def _judged(name: str, times: Times, output: torch.Tensor, exact: torch.Tensor, tolerance: float) -> Measured:
    """What was timed is right, or marked as wrong."""
    if name == FLOOR:
        return Measured(times)
    error = errors(output, exact)
    largest, mean = float(error.max()), float(error.mean())
    allowed = allowed_error(tolerance if name in (ALIGNED, LOSSLESS) else 0.0)
    return Measured(times, largest, mean, wrong=not largest <= allowed)


def _all_over(call: Call, inputs: Sequence[Inputs]) -> Callable[[], None]:
    def work() -> None:
        for arguments in inputs:
            call(*arguments)

    return work
