"""Lossless caches of 16-bit numbers, written and read by Triton in the interpreter: every byte of the reference's residuals,
and plain attention over the rows themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Case, added_error_in_rho, exact, hard_rows, make_case, relative_errors
from hypothesis import given, target
from hypothesis import strategies as st
from packed_cases import layout_of, read, run, stored, written
from triton_cases import distort, random_mask

from alignedkv_compile.arena import arena_views, unpack_scales

FLOAT32_SUMS = 2e-5
"""What sums in float32 may be off by, relative to an output's largest number."""
RAW = (5, 100, 133)
"""Rows that :func:`with_raw_rows` makes raw."""


def with_raw_rows(case: Case, *, value: float = 30.0) -> Case:
    """A few rows whose numbers differ too much in size for a residual to hold them; ``value`` makes their V larger."""
    for row in RAW:
        case.key[:, :, row, ::3] *= 1e-4
        case.value[:, :, row, ::2] *= value
    return case


def raw_rows(case: Case) -> int:
    views = arena_views(stored(case, "lossless"), layout_of(case, "lossless"))
    key_scale, value_scale, _ = unpack_scales(views.scales)
    assert torch.equal(torch.isfinite(key_scale), torch.isfinite(value_scale))
    return int((~torch.isfinite(key_scale)).sum())


HEADS = [
    pytest.param({"key_dim": 64}, id="64"),
    pytest.param({"key_dim": 64, "dtype": torch.float16}, id="64-fp16"),
    pytest.param({"key_dim": 21, "value_dim": 9, "dtype": torch.float16}, id="odd-fp16", marks=pytest.mark.slow),
    pytest.param({"key_dim": 80, "value_dim": 40}, id="80-40", marks=pytest.mark.slow),
    pytest.param({"key_dim": 21, "value_dim": 9}, id="odd"),
]


@pytest.mark.parametrize("heads", HEADS)
def test_the_bytes_of_the_reference(heads: dict[str, object]) -> None:
    case = with_raw_rows(make_case(rows=180, **heads))  # type: ignore[arg-type]
    hard_rows(case)
    case.key[0, 1, 150:160] *= 1e-3
    case.value[0, 1, ::3, ::7] = 0
    assert raw_rows(case) > 3 * case.key.shape[0] * case.key.shape[1]
    left, right = written(case, "lossless", [torch.arange(170), torch.arange(170, 171), torch.arange(171, 180)])
    for name in ("header", "scales", "key_hi", "key_mid", "value_hi", "value_mid", "residual", "value_count"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name


SHAPES = [
    pytest.param({"group": 3, "rows": 700}, id="grouped"),
    pytest.param({"group": 2, "rows": 600, "dtype": torch.float16, "unit_roundoff": 2.0**-8}, id="fp16"),
    pytest.param({"heads": 1, "group": 4, "rows": 900, "peak": 4.0}, id="peaked", marks=pytest.mark.slow),
    pytest.param(
        {"batch": 2, "heads": 1, "group": 1, "rows": 430, "key_dim": 21, "value_dim": 9}, id="odd", marks=pytest.mark.slow
    ),
    pytest.param({"heads": 1, "rows": 640, "query_rows": 2, "softcap": 20.0, "peak": 3.0, "tolerance": 4.0}, id="softcap"),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_few_bits_and_raw_rows(shape: dict[str, object]) -> None:
    case = with_raw_rows(make_case(**shape))  # type: ignore[arg-type]
    output, counts = read(case, stored(case, "lossless"), "lossless")
    assert added_error_in_rho(case, output).max() <= 3 * case.tolerance
    pairs = case.key.shape[0] * case.key.shape[1]
    assert raw_rows(case) == 3 * pairs
    assert counts["rows"] == pairs * case.live
    assert counts["key_rows_full"] >= 3 * pairs
    assert counts["value_rows_full"] >= 3 * pairs
    assert counts["key_rows_full"] + counts["value_rows_full"] < counts["rows"], "not streamed"
    assert counts["bytes_full"] == counts["rows"] * (case.key.shape[3] + case.value.shape[3]) * 2
    assert counts["bytes_read"] < 0.8 * counts["bytes_full"]


@pytest.mark.parametrize("shape", SHAPES)
def test_tolerance_zero_reads_every_bit(shape: dict[str, object]) -> None:
    case = with_raw_rows(make_case(**{**shape, "tolerance": 0.0}))  # type: ignore[arg-type]
    output, counts = read(case, stored(case, "lossless"), "lossless")
    assert relative_errors(output, exact(case)).max() <= FLOAT32_SUMS
    assert counts["bytes_read"] == counts["rows"] * layout_of(case, "lossless").stored_row


def test_raw_rows_that_outweigh_all_others() -> None:
    """Their norms count, though no header has them: else others' bits would be held to an output that is far too large."""
    case = with_raw_rows(make_case(rows=700), value=1e4)
    output, counts = read(case, stored(case, "lossless"), "lossless")
    assert counts["value_rows_full"] < counts["rows"]
    assert added_error_in_rho(case, output).max() <= 3 * case.tolerance


def test_numbers_that_are_not_finite() -> None:
    """A row with one is raw: it is read as it is, and only by those that attend to it."""
    case = make_case(batch=2, heads=1, group=2, rows=300, tolerance=4.0)
    case.value[:, 0, 7, 2] = torch.inf
    mask = torch.ones(2, 1, 1, 300, dtype=torch.bool)
    mask[0, ..., 7] = False
    case = replace(case, mask=mask)
    output, _ = read(case, stored(case, "lossless"), "lossless")
    finite = torch.isfinite(output)
    assert finite[0].all()
    assert not finite[1, ..., 2].any()
    assert finite[1].sum() == finite[1].numel() - 2, "the other columns are numbers"
    unmasked = replace(case, value=torch.where(torch.isfinite(case.value), case.value, 0.0))
    assert relative_errors(output[:1], exact(unmasked)[:1]).max() <= 0.02


def test_a_bias_and_sinks() -> None:
    case = with_raw_rows(make_case(batch=2, heads=1, group=2, rows=400, peak=3.0))
    bias = torch.zeros(2, 1, 1, 400)
    bias[0, ..., :130] = torch.finfo(torch.float32).min
    bias[1, ..., 200:] = -0.5
    case = replace(case, mask=bias, sinks=torch.tensor([0.5, -torch.inf]), length=390)
    output, counts = read(case, stored(case, "lossless"), "lossless")
    assert added_error_in_rho(case, output).max() <= 3 * case.tolerance
    assert counts["rows"] == (390 - 130) + 390


@pytest.mark.usefixtures("one_compilation")
@pytest.mark.slow
@given(
    rows=st.integers(1, 500),
    peak=st.sampled_from([0.0, 0.5, 2.0, 6.0]),
    tolerance=st.sampled_from([0.0, 1.0, 4.0]),
    seed=st.integers(0, 2**31),
    mask_rate=st.sampled_from([None, 0.02, 0.5, 0.98]),
    special=st.sampled_from(["none", "repeated rows", "sink", "outlier channel", "tiny", "huge", "zeros"]),
    raw_rate=st.sampled_from([0.0, 0.01, 0.5]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_any_values(
    rows: int,
    peak: float,
    tolerance: float,
    seed: int,
    mask_rate: float | None,
    special: str,
    raw_rate: float,
    dtype: torch.dtype,
) -> None:
    """Within a few budgets of float64, in every single output row."""
    mask = random_mask(mask_rate, rows, seed)
    fields = {"dtype": dtype, "unit_roundoff": 2.0**-8, "mask": mask, "tolerance": tolerance}
    case = make_case(heads=1, rows=rows, peak=peak, seed=seed, **fields)  # type: ignore[arg-type]
    distort(case, special, 60 if dtype == torch.bfloat16 else 8)
    raw = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < raw_rate
    case.key[:, :, raw, ::3] *= 1e-4
    added = float(added_error_in_rho(case, run(case, stored(case, "lossless"), "lossless")[0]).max()) / (6 * tolerance + 1)
    target(added, label="error over its budget")
    assert added <= 1
