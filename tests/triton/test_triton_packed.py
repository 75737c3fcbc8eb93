"""Caches that are arenas, written and read by Triton in the interpreter: against the reference's bytes, and plain attention
over the rows that these hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Case, added_error_in_rho, exact, keyed_caches, make_case, relative_errors
from hypothesis import given, target
from hypothesis import strategies as st
from packed_cases import layout_of, read, run, stored, written
from triton_cases import distort, random_mask
from triton_interpreter import interpreted

from alignedkv_compile import ops
from alignedkv_compile.layout import SCALES_BYTES
from alignedkv_compile.storage import WINDOW

QUERY_ERROR = 1e-3
"""What rounding the query to two int8 terms may change in an output, relative to its largest number."""

QUERY_ROUNDOFF = 2.0**-14
"""The same of a score, relative to the product of the norms."""


def held(case: Case, planes: torch.Tensor, storage: str) -> Case:
    """The case with the rows that an arena holds for K and V, which are in float32 so that nothing is rounded."""
    nothing = torch.arange(0)
    capacity = case.key.shape[2]
    key, value = (cache.float() for cache in (case.key, case.value))
    key, value = ops.load_rows.default(planes, key[:, :, :0], value[:, :, :0], nothing, capacity, capacity, storage)
    return replace(case, key=key, value=value)


def check_read(case: Case, storage: str, error: float) -> dict[str, int]:
    """The output is that of plain attention over what the arena holds, within ``error``; returns the counters."""
    planes = stored(case, storage)
    output, counts = read(case, planes, storage)
    rows = held(case, planes, storage)
    rows.value.nan_to_num_(0.0)  # those that are not attended to
    assert relative_errors(output, exact(rows)).max() <= error
    pairs = case.key.shape[0] * case.key.shape[1]
    assert counts["rows"] <= pairs * case.live
    row = (case.key.shape[3] + case.value.shape[3]) * case.key.element_size()
    assert counts["bytes_full"] == counts["rows"] * row
    return counts


@pytest.mark.parametrize("storage", [pytest.param("8bit", marks=pytest.mark.slow), "4bit+"])
@pytest.mark.parametrize("parts", ["prompt and tokens", "shuffled"])
def test_the_bytes_of_the_reference(storage: str, parts: str) -> None:
    case = make_case(batch=2, rows=300, key_dim=80, value_dim=40)
    cuts = [torch.arange(290), torch.arange(290, 291), torch.arange(291, 300)]
    if parts == "shuffled":
        cuts = [torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    left, right = written(case, storage, cuts)
    for name in ("header", "scales", "key_hi", "key_mid", "value_hi", "value_mid"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    if parts != "shuffled":
        assert torch.equal(left.value_count, right.value_count)
        torch.testing.assert_close(left.value_sum, right.value_sum, rtol=1e-5, atol=1e-4)


SHAPES = [
    pytest.param("8bit", {"group": 3, "rows": 700}, id="8bit"),
    pytest.param("4bit+", {"group": 4, "heads": 1, "rows": 900, "peak": 4.0}, id="4bit+"),
    pytest.param(
        "8bit",
        {"batch": 2, "heads": 1, "group": 1, "rows": 430, "key_dim": 21, "value_dim": 9},
        id="8bit-odd",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        *("8bit", {"heads": 1, "rows": 640, "query_rows": 4, "dtype": torch.float16, "softcap": 5.0}),
        id="8bit-softcap",
    ),
]


@pytest.mark.parametrize(("storage", "shape"), SHAPES)
def test_few_bits_are_as_good_as_those_that_there_are(storage: str, shape: dict[str, object]) -> None:
    case = make_case(**shape)  # type: ignore[arg-type]
    counts = check_read(case, storage, 0.02)
    assert counts["key_rows_full"] == counts["value_rows_full"] == 0, "not streamed, and there is nothing beyond the planes"
    assert counts["key_rows_mid"] > 0
    layout = layout_of(case, storage)
    refinement = layout.key_plane_row * (2 if case.softcap else 1)  # under a cap 4 bits are read again
    read_bytes = counts["rows"] * (layout.key_plane_row + SCALES_BYTES) + counts["key_rows_mid"] * refinement
    read_bytes += (counts["value_rows_hi"] + counts["value_rows_mid"]) * layout.value_plane_row
    assert 0 <= counts["bytes_read"] - read_bytes <= 2 * layout.heads * layout.blocks * layout.block_record, "blocks' means"


@pytest.mark.parametrize(("storage", "shape"), SHAPES)
def test_tolerance_zero_reads_all_that_there_is(storage: str, shape: dict[str, object]) -> None:
    case = make_case(tolerance=0.0, **shape)  # type: ignore[arg-type]
    counts = check_read(case, storage, QUERY_ERROR)
    assert counts["bytes_read"] == counts["rows"] * layout_of(case, storage).stored_row
    assert counts["rows"] == case.key.shape[0] * case.key.shape[1] * case.live


@pytest.mark.parametrize("reason", ["min_context", "special", "wide head", "many query rows", "tiny", "huge query"])
def test_what_is_streamed(reason: str) -> None:
    sizes: dict[str, dict[str, int]] = {
        "wide head": {"key_dim": 512, "value_dim": 256, "group": 1, "rows": 100},
        "many query rows": {"group": 3, "query_rows": 16, "rows": 100},
        "tiny": {"rows": 5},
    }
    case = make_case(**{"heads": 1, "rows": 300, "min_context": 301 if reason == "min_context" else 0, **sizes.get(reason, {})})
    if reason == "special":
        case.value[0, 0, 7, 2] = torch.inf
        mask = torch.ones(1, 1, 1, 300, dtype=torch.bool)
        mask[..., 7] = False  # nothing of a row that is not attended to may come through
        case = replace(case, mask=mask)
        assert check_read(case, "8bit", 0.02)["key_rows_full"] == 0
        case.mask[..., 7] = True
        assert torch.isnan(read(case, stored(case, "8bit"), "8bit")[0]).all(), "in 8 bits all of such a row is NaN"
        return
    if reason == "huge query":
        case.query[0, 0, 0, 0] = torch.inf
        output = read(case, stored(case, "8bit"), "8bit")[0]
        assert torch.isnan(output[0, 0]).all()
        assert torch.isfinite(output[0, 1:]).all()
        return
    assert check_read(case, "8bit", QUERY_ERROR)["key_rows_full"] == case.live


def test_masks_and_sinks() -> None:
    case = make_case(batch=2, heads=1, group=2, rows=400, peak=3.0)
    bias = torch.zeros(2, 1, 1, 400)
    bias[0, ..., :130] = torch.finfo(torch.float32).min
    bias[1, ..., 200:] = -0.5
    case = replace(case, mask=bias, sinks=torch.tensor([0.5, -torch.inf]), length=390)
    counts = check_read(case, "4bit+", 0.02)
    assert counts["rows"] == (390 - 130) + 390
    window = 400 - WINDOW
    assert counts["key_rows_mid"] <= 390 - window + WINDOW + (390 - window), "the others have no more bits"


def test_what_has_no_triton_is_called_as_it_is() -> None:
    """Lossless rows of fp32, and rows for a prompt: the operators' eager meaning, from within the compiled graph."""
    case = make_case(heads=1, rows=40, dtype=torch.float32)
    new, capacity = torch.arange(40), 40
    expected, found = (torch.zeros(layout_of(case, "lossless").total, dtype=torch.uint8) for _ in range(2))
    ops.store_rows.default(expected, case.key, case.value, new, capacity, "lossless")

    def step(planes: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ops.store_rows.default(planes, key, value, new, capacity, "lossless")
        return ops.load_rows.default(planes, key[:, :, :1], value[:, :, :1], new[:1], capacity, capacity, "lossless")

    with interpreted(), keyed_caches():
        key, value = torch.compile(step, fullgraph=True)(found, case.key, case.value)
    assert torch.equal(found, expected)
    assert torch.equal(key, case.key)
    assert torch.equal(value, case.value)


@pytest.mark.usefixtures("one_compilation")
@pytest.mark.slow
@given(
    storage=st.sampled_from(["8bit", "4bit+"]),
    rows=st.integers(1, 500),
    peak=st.sampled_from([0.0, 0.5, 2.0, 6.0]),
    tolerance=st.sampled_from([0.0, 1.0, 4.0]),
    seed=st.integers(0, 2**31),
    mask_rate=st.sampled_from([None, 0.02, 0.5, 0.98]),
    special=st.sampled_from(["none", "repeated rows", "sink", "outlier channel", "tiny", "huge"]),
)
def test_any_values(
    storage: str, rows: int, peak: float, tolerance: float, seed: int, mask_rate: float | None, special: str
) -> None:
    """Within a few budgets of float64 over the rows that the arena holds, in every single output row."""
    mask = random_mask(mask_rate, rows, seed)
    case = make_case(heads=1, rows=rows, peak=peak, seed=seed, mask=mask, tolerance=tolerance)
    distort(case, special, 60)
    planes = stored(case, storage)
    rows_held = replace(held(case, planes, storage), unit_roundoff=case.roundoff)
    scores = float((case.query.norm(dim=-1).max() * rows_held.key.norm(dim=-1).max()) * case.factor)
    added = float(added_error_in_rho(rows_held, run(case, planes, storage)[0]).max())
    added /= 6 * tolerance + 1 + scores * QUERY_ROUNDOFF / case.roundoff
    target(added, label="error over its budget")
    assert added <= 1
