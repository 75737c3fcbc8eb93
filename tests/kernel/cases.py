"""Attention calls for the kernel tests, run through the reference, through generated C++, and in float64."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import pytest
import torch

from alignedkv_compile import arena, lowering, ops, precision, reference_query
from alignedkv_compile.layout import arena_layout
from alignedkv_compile.lowering.isa import CHOICES, machine_isa
from alignedkv_compile.options import UNIT_ROUNDOFF
from alignedkv_compile.own_kernels import post_grad_pass
from alignedkv_compile.reference_head import hadamard
from alignedkv_compile.reference_scan import ScanCounts, read_scanned

SUM_ERROR = 2.0**-21
"""Relative error of a float32 attention over a few thousand rows, as a multiple of the rms of its addends: the summation-order
budget between two paths that read the same numbers."""

KAPPA = float(precision.KAPPA)

FLIP_BUDGET = 0.25
"""Two paths may disagree on rows that sit on a threshold. Each such row moves the output by at most theta, which is far below
the whole budget alpha * rho: a quarter of it allows for several."""

NATIVE_ISAS = CHOICES[CHOICES.index(machine_isa()) :]
"""Instruction sets that this machine runs; AVX-512 and AMX are emulated where they are missing."""


@dataclass(frozen=True)
class Case:
    """One call: shapes, dtypes and options. ``mask`` is None or ``[B|1, Hq|1, Q|1, T]``, ``sinks`` None or ``[Hq]``."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    length: int | None = None
    scale: float | None = None
    softcap: float = 0.0
    tolerance: float = 2.0
    unit_roundoff: float | None = None
    min_context: int = 0

    @property
    def live(self) -> int:
        return self.key.shape[2] if self.length is None else self.length

    @property
    def factor(self) -> float:
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale

    @property
    def roundoff(self) -> float:
        return UNIT_ROUNDOFF[self.key.dtype] if self.unit_roundoff is None else self.unit_roundoff

    def arguments(self, planes: torch.Tensor | None) -> tuple[object, ...]:
        return (
            *(self.query, self.key, self.value, planes, self.mask, self.sinks, self.live),
            *(self.factor, self.softcap, self.tolerance, self.roundoff, self.min_context),
        )

    def __repr__(self) -> str:
        mask = None if self.mask is None else (tuple(self.mask.shape), self.mask.dtype)
        shapes = tuple(self.query.shape), tuple(self.key.shape), self.value.shape[-1]
        scores = f"softcap={self.softcap}, sinks={None if self.sinks is None else self.sinks.tolist()}"
        return f"Case({shapes}, {self.key.dtype}, mask={mask}, {scores}, live={self.live}, tolerance={self.tolerance})"


def make_case(
    batch: int = 1,
    heads: int = 2,
    group: int = 3,
    query_rows: int = 1,
    rows: int = 700,
    key_dim: int = 64,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    query_dtype: torch.dtype = torch.float32,
    peak: float = 2.0,
    seed: int = 0,
    **fields: object,
) -> Case:
    """Normal K and V; ``peak`` scales the query, so that attention is flat (0) or dominated by few rows (above 4)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return Case(
        query=(normal(batch, heads * group, query_rows, key_dim) * peak).to(query_dtype),
        key=normal(batch, heads, rows, key_dim).to(dtype),
        value=(normal(batch, heads, rows, value_dim or key_dim) + 0.3).to(dtype),
        **fields,  # type: ignore[arg-type]
    )


MISREAD = [(4.0, 0.3), (24.0, 6.0), (33.0, 0.3), (33.0, 6.0), (60.0, 2.0), (200.0, 0.3)]
"""Arguments of :func:`misread_case`: 4 bits read scores from 15 to 800 away from the truth, which is 1 to 200."""


def misread_case(strength: float, score: float, *, above: bool = False, rows: int = 40, tolerance: float = 64.0) -> Case:
    """One row of K with about ``strength * score`` among zeros, each of whose mixed elements is read at 4 bits as far below its
    value, or ``above``, as can be, times the same number of the mixed query."""
    dim, place = 64, 20
    dither = place * 0.6180339887498949 % 1 - 0.5
    mixed = torch.full((dim,), ((0.02 if above else 0.98) - dither) / 8)  # at the edge of a code; the row's scale is 1
    mixed[0] = 15 / 16
    steps = round(float(score - mixed.sum()) * 8)
    mixed[1:] += (steps // (dim - 1) + (torch.arange(dim - 1) < steps % (dim - 1))) / 8
    key = torch.zeros(1, 1, rows, dim)
    key[0, 0, place] = hadamard(mixed)  # its own inverse
    value = torch.randn(1, 1, rows, dim, generator=torch.Generator().manual_seed(0))
    query = hadamard(torch.full((1, 1, 1, dim), strength))
    return Case(query=query, key=key, value=value, unit_roundoff=2.0**-8, tolerance=tolerance, scale=1.0)


def hard_rows(case: Case) -> None:
    """Rows of zeros, one number, huge, tiny, NaN and Inf, in both caches."""
    for cache in (case.key, case.value):
        cache[:, :, 3] = 0
        cache[:, :, 5] = 1
        cache[:, :, 7] *= torch.finfo(cache.dtype).max / 8
        cache[:, :, 9] *= torch.finfo(cache.dtype).tiny
        cache[0, 0, 11, 2] = torch.nan
        cache[0, 0, 13, 1] = -torch.inf


def write_planes(case: Case, *, valid: bool = True) -> torch.Tensor:
    """The arena of a case's caches, written by the reference."""
    rows = case.key.shape[2]
    planes = torch.zeros(arena_layout(case.key, case.value).total, dtype=torch.uint8)
    ops.quantize_on_write(planes, case.key, case.value, torch.arange(rows), rows)
    arena.mark(planes, valid=valid)
    return planes


def exact(case: Case) -> torch.Tensor:
    """Plain attention in float64 on the same stored values; fully masked query rows give zeros."""
    keys, values = case.key[:, :, : case.live].double(), case.value[:, :, : case.live].double()
    group = case.query.shape[1] // keys.shape[1]
    scores = case.query.double() @ keys.repeat_interleave(group, 1).mT * case.factor
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    if case.mask is not None:
        mask = case.mask[..., : case.live]
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    live = scores.shape[-1]
    if case.sinks is not None:
        sinks = case.sinks.double()[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = torch.where((scores == -math.inf).all(-1, keepdim=True), 0.0, scores.softmax(-1))[..., :live]
    return weights @ values.repeat_interleave(group, 1)


@dataclass(frozen=True)
class Result:
    """An operator's output and its counters by name."""

    output: torch.Tensor
    counts: dict[str, int]


def _run(call: Callable[..., torch.Tensor], case: Case, planes: torch.Tensor | None) -> Result:
    counters = torch.zeros(2, len(ops.COUNTER_FIELDS), dtype=torch.int64)
    output = call(*case.arguments(planes), counters, 1)
    assert not counters[0].any()
    return Result(output, dict(zip(ops.COUNTER_FIELDS, counters[1].tolist(), strict=True)))


def run_reference(case: Case, planes: torch.Tensor | None) -> Result:
    return _run(ops.aligned_read_attention.counted, case, planes)


def run_scanned(case: Case, planes: torch.Tensor, splits: int = 8) -> tuple[Result, ScanCounts]:
    """The reference of a GPU's order of steps, with ``splits`` programs to a pair, and all that it counts."""
    counts = ScanCounts()
    query, key, value, _, *rest = case.arguments(None)
    output = read_scanned(query, key, value, planes, *rest, splits=splits, counts=counts)  # type: ignore[arg-type]
    return Result(output, {name: asdict(counts).get(name, 1) for name in ops.COUNTER_FIELDS}), counts


@dataclass(frozen=True)
class Certified(Result):
    """The same of a certified read, with its certificates ``[Hq]`` in units of ``u * ||output||``."""

    bounds: torch.Tensor


def _run_certified(call: Callable[..., torch.Tensor], case: Case, planes: torch.Tensor | None) -> Certified:
    heads = case.query.shape[1]
    bounds = torch.zeros(2, 2, heads + 1)
    bounds[1, 0] = torch.inf  # of the call before
    bounds[1, :, heads:] = -1  # another site's heads
    counters = torch.zeros(2, len(ops.COUNTER_FIELDS), dtype=torch.int64)
    output = call(*case.arguments(planes), bounds, counters, 1)
    assert not bounds[0].any()
    assert not counters[0].any()
    assert bool((bounds[1, :, heads:] == -1).all())
    last, worst = bounds[1, :, :heads]
    assert torch.equal(last, worst)
    return Certified(output, dict(zip(ops.COUNTER_FIELDS, counters[1].tolist(), strict=True)), last)


def run_certified_reference(case: Case, planes: torch.Tensor | None) -> Certified:
    return _run_certified(ops.certified_read_attention.counted, case, planes)


def run_certified_lossless(case: Case, planes: torch.Tensor, *, compiled: bool) -> Certified:
    """The certified read of a lossless cache, in generated C++ or by the reference."""
    if not compiled:
        return _run_certified(_certified_lossless, case, planes)
    _mark_rows_dynamic(case, planes)
    with keyed_caches():
        return _run_certified(_compiled_certified_lossless(), case, planes)


def _certified_lossless(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, planes: torch.Tensor, *others: object
) -> torch.Tensor:
    """Of K and V only the shapes are read."""
    mask, sinks, *rest = others
    cache = (key.shape[1], value.shape[3], key.dtype, "lossless", key.shape[2])
    return ops.certified_packed_read_attention.counted(query, planes, mask, sinks, *cache, *rest)


def certified_errors(case: Case, output: torch.Tensor) -> torch.Tensor:
    """Errors ``[Hq]`` in units of ``u * ||output||``, the largest over query rows: what certificates bound."""
    error = (output.double() - exact(case)).norm(dim=-1)
    size = output.double().norm(dim=-1)
    return torch.where(error > 0, error / (case.roundoff * size), 0.0).amax((0, 2))


@contextlib.contextmanager
def keyed_caches() -> Iterator[None]:
    """Inductor's caches keyed by our sources and instruction set, as the backend keys them."""
    lowering.register()
    keyed = torch._inductor.config.patch(post_grad_custom_post_pass=post_grad_pass("kernel tests"))
    with keyed, torch._dynamo.config.patch(recompile_limit=256):
        yield


def run_kernel(case: Case, planes: torch.Tensor | None) -> Result:
    """Through torch.compile and the C++ lowering; rows are symbolic, so that a shape's kernel is compiled once."""
    _mark_rows_dynamic(case, planes)
    with keyed_caches():
        return _run(_compiled_attention(), case, planes)


def run_certified_kernel(case: Case, planes: torch.Tensor | None) -> Certified:
    """The same for the certified read."""
    _mark_rows_dynamic(case, planes)
    with keyed_caches():
        return _run_certified(_compiled_certified(), case, planes)


def _mark_rows_dynamic(case: Case, planes: torch.Tensor | None) -> None:
    for tensor, dims in ((case.key, (2,)), (case.value, (2,)), (case.mask, (3,)), (planes, (0,))):
        for dim in dims:
            if tensor is not None and tensor.shape[dim] > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)


@functools.cache
def _compiled_attention() -> Callable[..., torch.Tensor]:
    def attention(*arguments: object) -> torch.Tensor:
        return ops.aligned_read_attention.counted(*arguments)

    return torch.compile(attention, fullgraph=True)


@functools.cache
def _compiled_certified() -> Callable[..., torch.Tensor]:
    def attention(*arguments: object) -> torch.Tensor:
        return ops.certified_read_attention.counted(*arguments)

    return torch.compile(attention, fullgraph=True)


@functools.cache
def _compiled_certified_lossless() -> Callable[..., torch.Tensor]:
    return torch.compile(_certified_lossless, fullgraph=True)


def run_write(planes: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, capacity: int) -> None:
    """quantize_on_write through torch.compile and the C++ lowering."""
    with keyed_caches():
        torch.compile(_write, fullgraph=True)(planes, key, value, positions, capacity)


def _write(*arguments: object) -> None:
    ops.quantize_on_write.default(*arguments)


def relative_errors(output: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Norm of the error of each output row over the norm of the expected row, flattened."""
    return ((output.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)).flatten()


def added_error_in_rho(case: Case, output: torch.Tensor) -> torch.Tensor:
    """Errors in units of the rounding error that the accuracy dtype makes on each output row: what tolerance bounds in rms."""
    return relative_errors(output, exact(case)) / (KAPPA * case.roundoff)


def assert_second_term(result: Result, run: Callable[[], Result]) -> None:
    """The query's second int8 term is in the kernel's scores: leaving it out would move the output far more than the kernel
    differs from its reference, which is ``run``."""
    expected = run().output.double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_query, "QUERY_TERMS", 1)
        one_term = run().output
    assert relative_errors(result.output, expected).median() < 0.25 * relative_errors(one_term, expected).median()


def without_planes(case: Case) -> Case:
    return replace(case, tolerance=0.0)


def agreement_budget(case: Case) -> float:
    """Largest relative difference of two paths that take the same decisions but for a few rows on a threshold."""
    rounding = torch.finfo(case.query.dtype).eps if case.query.dtype != torch.float32 else 0.0
    return FLIP_BUDGET * case.tolerance * KAPPA * case.roundoff + 8 * SUM_ERROR + rounding


NUMBERS = ["query", "key", "value", "value, masked for one row", "key inf", "value inf"]
"""Where :func:`case_with_number` puts a NaN, or an Inf if it says so."""


def case_with_number(where: str, rows: int, tolerance: float) -> tuple[Case, torch.Tensor]:
    """A case with one NaN or Inf, whose third query row does not attend to the last rows; and what attention gives, in float64.

    Plain attention computes 0 * NaN for a row that masks the number; here a masked number changes nothing.
    """
    middle, masked = rows // 2 - 50, rows // 2 + 50
    mask = torch.ones(1, 1, 4, rows, dtype=torch.bool)
    mask[..., 2, masked:] = False
    case = make_case(query_rows=4, rows=rows, mask=mask, tolerance=tolerance)
    number = torch.inf if "inf" in where else torch.nan
    if where == "query":
        case.query[0, 1, 2, 3] = number
    elif where.startswith("key"):
        case.key[0, 1, middle, 5] = number
    else:
        case.value[0, 0, masked + 50 if "masked" in where else middle, 5] = number
    expected = exact(case)
    if "masked" in where:
        expected[:, :, 2] = exact(replace(case, value=case.value.nan_to_num(0.0)))[:, :, 2]
    return case, expected


def assert_propagated(case: Case, output: torch.Tensor, expected: torch.Tensor) -> None:
    """NaN and Inf stand where they should, and every other number is within the tolerance."""
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(output), finite)
    infinite = ~finite & ~expected.isnan()
    assert torch.equal(output[infinite].double(), expected[infinite])
    budget = (4 * case.tolerance * KAPPA * case.roundoff + 16 * SUM_ERROR) * float(expected[finite].abs().max())
    torch.testing.assert_close(output[finite].double(), expected[finite], rtol=0, atol=budget)
