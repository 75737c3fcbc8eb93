"""Writing planes: what is stored, to the bit, by the reference and by every instruction set's kernel."""

from __future__ import annotations

import math

import pytest
import torch
from cases import hard_rows, make_case, run_write, write_planes
from hypothesis import given
from hypothesis import strategies as st

from alignedkv_compile import arena, reference_head, reference_write
from alignedkv_compile.arena import arena_views
from alignedkv_compile.layout import (
    BLOCK_ROWS,
    CODE_RANGE,
    HI_STEP,
    MAX_HEAD_DIM,
    MID_STEP,
    ArenaLayout,
    arena_layout,
    hadamard_blocks,
)
from alignedkv_compile.row_header import VALUE_NORM

SHAPES = [(64, 64, torch.bfloat16), (80, 48, torch.float16), (128, 128, torch.float32), (21, 9, torch.bfloat16)]


@pytest.mark.parametrize(("key_dim", "value_dim", "dtype"), SHAPES)
def test_kernel_writes_the_bits_of_the_reference(isa: str, key_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    case = make_case(batch=2, rows=300, key_dim=key_dim, value_dim=value_dim, dtype=dtype)
    hard_rows(case)
    expected = write_planes(case)
    written = torch.zeros_like(expected)
    run_write(written, case.key, case.value, torch.arange(300), 300)
    layout = arena_layout(case.key, case.value)
    left, right = arena_views(expected, layout), arena_views(written, layout)
    (*scales, norm), (*written_scales, written_norm) = (arena.unpack_scales(views.scales[:, :300]) for views in (left, right))
    rows = torch.isfinite(sum(scales))
    for name in ("key_mid", "value_hi", "value_mid"):
        assert torch.equal(getattr(left, name)[:, :300][rows], getattr(right, name)[:, :300][rows]), name
    scores = [arena.unpack_score_order(views.key_hi)[:, :300][rows] for views in (left, right)]
    assert torch.equal(*scores)
    for expected_scale, scale in zip(scales, written_scales, strict=True):
        assert torch.equal(scale[rows], expected_scale[rows])
    # a sum in another order may round another way
    torch.testing.assert_close(written_norm[rows], norm[rows], rtol=2**-5, atol=0)
    assert torch.equal(left.value_count, right.value_count)
    usable = left.value_count > 0
    torch.testing.assert_close(left.value_sum[usable], right.value_sum[usable], rtol=1e-6, atol=1e-5)
    assert not torch.isfinite(sum(written_scales))[~rows].any()


@pytest.mark.parametrize("order", ["one by one", "chunks", "shuffled", "rewritten"])
def test_order_of_writes_changes_no_plane_and_never_a_wrong_sum(order: str) -> None:
    """However rows arrive, planes are the same; a block's sum is either that of its rows, or marked unusable."""
    case = make_case(rows=2 * BLOCK_ROWS + 40)
    rows = case.key.shape[2]
    layout = arena_layout(case.key, case.value)
    positions = {
        "one by one": [[i] for i in range(rows)],
        "chunks": [list(range(i, min(i + 50, rows))) for i in range(0, rows, 50)],
        "shuffled": [torch.randperm(rows, generator=torch.Generator().manual_seed(1)).tolist()],
        "rewritten": [list(range(rows)), [BLOCK_ROWS + 3], list(range(BLOCK_ROWS))],
    }[order]
    written = torch.zeros(layout.total, dtype=torch.uint8)
    for chunk in positions:
        index = torch.tensor(chunk)
        run_write(written, case.key[:, :, index], case.value[:, :, index], index, rows)
    expected, views = arena_views(write_planes(case), layout), arena_views(written, layout)
    for name in ("key_hi", "key_mid", "value_hi", "value_mid", "scales"):
        assert torch.equal(getattr(expected, name), getattr(views, name)), name
    values = case.value.float().flatten(0, 1)
    for block in range(2):
        total = values[:, block * BLOCK_ROWS : (block + 1) * BLOCK_ROWS].sum(1)
        for head in range(values.shape[0]):
            if views.value_count[head, block] == BLOCK_ROWS:
                torch.testing.assert_close(views.value_sum[head, block], total[head], rtol=1e-4, atol=1e-3)
    complete = (views.value_count[:, :2] == BLOCK_ROWS).all(0).tolist()
    assert complete == {"shuffled": [False, False], "rewritten": [True, False]}.get(order, [True, True])


def test_rows_outside_the_capacity_are_left_to_the_cache_to_report() -> None:
    case = make_case(rows=20)
    planes = write_planes(case)
    before = planes.clone()
    run_write(planes, case.key[:, :, :3], case.value[:, :, :3], torch.tensor([-1, 20, 1 << 40]), 20)
    assert torch.equal(planes, before)


@pytest.mark.parametrize("bits", [4, 8])
def test_planes_read_back_within_half_a_step(bits: int) -> None:
    """A number read at b bits is off by at most half a step, and not exact: bits were really left out."""
    case = make_case(rows=256, dtype=torch.float32)
    rows = reference_head.hadamard(case.key[0, 0])
    scale = rows.abs().amax(-1) * 16 / 15
    codes = reference_write.encode(rows, scale, torch.arange(256))
    hi, mid = codes // 16, codes % 16
    code = (hi.int() << 12) + ((mid.int() << 8) if bits == 8 else 0) - CODE_RANGE
    step = HI_STEP if bits == 4 else MID_STEP
    offset = reference_head.dither(torch.arange(256))[:, None] * HI_STEP
    back = (code[:, :64] + step / 2 - offset) * scale[:, None] / CODE_RANGE
    error = (back - rows).abs() / (scale[:, None] * step / CODE_RANGE)
    assert 0.4 < error.max() <= 0.5 + 1e-3


@given(st.integers(1, 512), st.integers(0, 2**31))
def test_hadamard_is_orthonormal_and_its_own_inverse(dim: int, seed: int) -> None:
    x = torch.randn(3, dim, generator=torch.Generator().manual_seed(seed))
    mixed = reference_head.hadamard(x)
    assert sum(hadamard_blocks(dim)) == dim
    torch.testing.assert_close(mixed.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(reference_head.hadamard(mixed), x, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 4), st.integers(1, 40), st.integers(0, 2**31))
def test_packing_round_trips(groups: int, half: int, seed: int) -> None:
    nibbles = torch.randint(0, 16, (groups * 16, half * 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = arena.pack_score_order(nibbles).view(groups, 16, half, 4).movedim(1, 2)
    assert torch.equal(arena.unpack_score_order(packed), nibbles)
    assert torch.equal(arena.unpack_row_order(arena.pack_row_order(nibbles)), nibbles)


SCALES = st.lists(st.floats(0, math.inf, width=32), min_size=1, max_size=20)


@given(SCALES, SCALES, st.floats(VALUE_NORM.smallest, MAX_HEAD_DIM**0.5))
def test_scales_round_up_by_a_sixteenth_and_norms_to_the_nearest(keys: list[float], values: list[float], norm: float) -> None:
    count = min(len(keys), len(values))
    key, value, share = (torch.tensor(x, dtype=torch.float32) for x in (keys[:count], values[:count], [norm] * count))
    stored_key, stored_value, stored_norm = arena.unpack_scales(arena.pack_scales(key, value, share))
    smallest = 2.0**-130  # what four bits of mantissa resolve of the smallest numbers
    assert (stored_key >= key).all()
    assert ((stored_key <= key * (1 + 1 / 16) + smallest) | (key > 2.0**127)).all()
    usable = value < 2.0**120
    assert torch.equal(stored_value[usable], arena.rounded_scale(value[usable]))
    assert torch.equal(arena.rounded_scale(stored_key), stored_key)
    assert (
        (stored_norm - stored_value * share).abs()[usable] <= (stored_value * share)[usable] * (1 / 64 + 1e-6) + 1e-44
    ).all()
    assert (torch.isfinite(stored_norm) == torch.isfinite(stored_value)).all()


def test_scales_keep_what_is_not_finite() -> None:
    numbers = torch.tensor([torch.inf, torch.nan, 1.0, 3e38])
    key, value, _ = arena.unpack_scales(arena.pack_scales(numbers, numbers, torch.ones(4)))
    assert key[:3].tolist() == [math.inf, pytest.approx(math.nan, nan_ok=True), 1.0]
    assert torch.isnan(value).tolist() == [False, True, False, False]
    assert torch.isinf(value).tolist() == [True, False, False, True]  # 3e38: a norm of it may leave float32


def test_sections_do_not_overlap_and_are_aligned() -> None:
    layout = ArenaLayout(heads=6, capacity=1000, key_dim=80, value_dim=72)
    arena_bytes = torch.zeros(layout.total, dtype=torch.uint8)
    views = arena_views(arena_bytes, layout)
    for field in ("header", "scales", "key_hi", "key_mid", "value_hi", "value_mid"):
        view = getattr(views, field)
        assert view.storage_offset() * view.element_size() % 64 == 0
        assert not view.any()
        view.fill_(1)
    for field in ("value_count", "value_sum"):
        assert not getattr(views, field).any()


def test_a_short_arena_is_refused() -> None:
    with pytest.raises(ValueError, match="holds 10 bytes, its layout needs"):
        arena_views(torch.zeros(10, dtype=torch.uint8), ArenaLayout(1, 16, 16, 16))
