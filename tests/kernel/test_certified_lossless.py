"""The certified read of a lossless cache in generated C++: every instruction set against the reference, and certificates
against float64. Its rows are decoded, and raw ones have no bits that say less than all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import NUMBERS, Case, case_with_number, exact, make_case, run_certified_lossless
from hypothesis import given
from hypothesis import strategies as st
from test_attention import masks
from test_certified import change_values, check_agreement, check_certificates

from alignedkv_compile import ops
from alignedkv_compile.arena import arena_views, unpack_scales
from alignedkv_compile.layout import ArenaLayout
from alignedkv_compile.storage import LOSSLESS

RAW = (5, 100, 133, 500)
SHAPES = [
    {"group": 3, "key_dim": 64, "rows": 900, "peak": 6.0, "tolerance": 4.0},
    {"heads": 1, "group": 1, "key_dim": 128, "rows": 1500, "dtype": torch.float16, "peak": 5.0, "tolerance": 32.0},
    {
        "batch": 2,
        "group": 2,
        "key_dim": 80,
        "value_dim": 40,
        "query_rows": 2,
        "peak": 4.0,
        "tolerance": 16.0,
        "softcap": 30.0,
    },
]


def layout_of(case: Case) -> ArenaLayout:
    batch, heads, capacity, key_dim = case.key.shape
    return ArenaLayout(batch * heads, capacity, key_dim, case.value.shape[3], LOSSLESS, case.key.element_size())


def stored(case: Case) -> torch.Tensor:
    """The arena with all rows, written by the reference."""
    planes = torch.zeros(layout_of(case).total, dtype=torch.uint8)
    capacity = case.key.shape[2]
    ops.store_rows.default(planes, case.key, case.value, torch.arange(capacity), capacity, LOSSLESS.name)
    return planes


def with_raw_rows(case: Case, rows: tuple[int, ...] = RAW) -> Case:
    """Rows whose numbers differ too much in size for a residual to hold them."""
    for row in rows:
        case.key[:, :, row, ::3] *= 1e-7
        case.value[:, :, row, ::2] *= 30
    return case


def raw_rows(case: Case, planes: torch.Tensor) -> int:
    return int((~torch.isfinite(unpack_scales(arena_views(planes, layout_of(case)).scales)[0])).sum())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(f"{k}={v}" for k, v in shape.items()))
def test_kernel_agrees_with_the_reference(isa: str, shape: dict[str, object]) -> None:
    case = with_raw_rows(make_case(**shape))  # type: ignore[arg-type]
    planes = stored(case)
    pairs = case.key.shape[0] * case.key.shape[1]
    assert raw_rows(case, planes) >= len(RAW) * pairs
    kernel, expected = (run_certified_lossless(case, planes, compiled=compiled) for compiled in (True, False))
    check_agreement(case, kernel, expected)
    check_certificates(case, kernel)
    check_certificates(case, expected)
    assert bool((kernel.bounds > 0).all()), "raw rows do not stream a head"
    assert kernel.counts["bytes_read"] < 0.95 * kernel.counts["bytes_full"], "without bits left out this tests nothing"
    for name in ("key_rows_full", "value_rows_full"):
        assert len(RAW) * pairs <= kernel.counts[name] < kernel.counts["rows"]


@pytest.mark.parametrize("name", list(masks(8)))
def test_masks(name: str) -> None:
    rows = 600
    case = make_case(batch=2, query_rows=4, rows=rows, mask=masks(rows)[name], peak=5.0, tolerance=32.0)
    planes = stored(with_raw_rows(case, RAW[:3]))
    kernel, expected = (run_certified_lossless(case, planes, compiled=compiled) for compiled in (True, False))
    check_agreement(case, kernel, expected)
    assert torch.equal(kernel.output.norm(dim=-1) == 0, exact(case).norm(dim=-1) == 0)


@pytest.mark.parametrize("where", NUMBERS)
def test_numbers_that_are_not_finite_are_read_as_they_are(where: str) -> None:
    case, expected = case_with_number(where, 700, 32.0)
    kernel = run_certified_lossless(case, stored(case), compiled=True)
    assert torch.equal(torch.isfinite(kernel.output), torch.isfinite(expected))
    assert not kernel.bounds.view(2, -1)[int(where.startswith("key"))].any(), "the head with the number is streamed"


@pytest.mark.slow
@given(
    rows=st.one_of(st.integers(2, 40), st.integers(2, 700), st.sampled_from((127, 128, 129, 256))),
    peak=st.sampled_from((0.0, 0.3, 2.0, 5.0, 12.0)),
    values=st.sampled_from(("normal", "repeated rows", "all equal", "outlier channel", "zeros", "tiny", "huge", "far codes")),
    attended=st.sampled_from((None, 0.05, 0.6)),
    raw_rate=st.sampled_from((0.0, 0.02, 1.0)),
    seed=st.integers(0, 2**31),
)
def test_no_error_exceeds_its_certificate(
    rows: int, peak: float, values: str, attended: float | None, raw_rate: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    case = make_case(group=3, key_dim=64, tolerance=8.0, rows=rows, peak=peak, seed=seed)
    if attended is not None:
        mask = torch.rand(1, 1, 1, rows, generator=generator) < attended
        mask[..., rows // 2] = True
        case = replace(case, mask=mask)
    change_values(values, case.key, case.value)
    with_raw_rows(case, tuple((torch.rand(rows, generator=generator) < raw_rate).nonzero()[:, 0].tolist()))
    check_certificates(case, run_certified_lossless(case, stored(case), compiled=True))
