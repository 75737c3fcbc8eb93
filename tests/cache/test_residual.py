"""Residuals give every number back bit for bit, whatever rows hold and whatever their length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignedkv_compile import ops
from alignedkv_compile.arena import arena_views, unpack_scales
from alignedkv_compile.bit_stream import packed_bits, unpacked_bits
from alignedkv_compile.layout import ArenaLayout
from alignedkv_compile.residual import from_ordered_bits, ordered_bits
from alignedkv_compile.residual_fields import PREFIX_BYTES, Intervals, decode_fields, encode_fields, pack_fields
from alignedkv_compile.storage import STORAGES

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def bits(rows: torch.Tensor) -> torch.Tensor:
    return rows.contiguous().view(torch.int16 if rows.element_size() == 2 else torch.int32)


def held(key: torch.Tensor, value: torch.Tensor, storage: str = "lossless") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K and V out of an arena that they were stored in, and the arena's scales of K ``[BH, S]``."""
    batch, heads, rows, key_dim = key.shape
    layout = ArenaLayout(batch * heads, rows, key_dim, value.shape[-1], STORAGES[storage], key.element_size())
    planes = torch.zeros(layout.total, dtype=torch.uint8)
    ops.store_rows(planes, key, value, torch.arange(rows), rows, storage)
    none = torch.arange(0)
    keys, values = ops.load_rows(planes, key[:, :, :0], value[:, :, :0], none, rows, rows, storage)
    return keys, values, unpack_scales(arena_views(planes, layout).scales[:, :rows])[0]


@given(
    st.sampled_from(DTYPES),
    st.sampled_from([(8, 8), (64, 64), (80, 72), (192, 128), (13, 40)]),
    st.integers(0, 2**31),
    st.floats(-30, 4),
)
def test_random_rows_come_back_bit_for_bit(dtype: torch.dtype, dims: tuple[int, int], seed: int, magnitude: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(1, 2, 9, dim, generator=generator).mul(10**magnitude).to(dtype) for dim in dims)
    keys, values, _ = held(key, value)
    assert torch.equal(bits(keys), bits(key))
    assert torch.equal(bits(values), bits(value))


@given(st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_any_bits_come_back(dtype: torch.dtype, seed: int) -> None:
    """Random bits: NaN of all kinds, Inf, subnormal numbers, and magnitudes that no code can hold; most rows are raw."""
    generator = torch.Generator().manual_seed(seed)
    size = (1, 1, 6, 16 * dtype.itemsize)
    key, value = (torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).view(dtype) for _ in range(2))
    keys, values, _ = held(key, value)
    assert torch.equal(bits(keys), bits(key))
    assert torch.equal(bits(values), bits(value))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_of_both_signs_come_back(dtype: torch.dtype) -> None:
    key, value = torch.randn(1, 1, 4, 64).to(dtype), torch.randn(1, 1, 4, 64).to(dtype)
    key[..., ::3], value[..., 1::5] = 0.0, -0.0
    key[0, 0, 0], value[0, 0, 1] = 0.0, -0.0
    keys, values, _ = held(key, value)
    assert torch.equal(bits(keys), bits(key))
    assert torch.equal(bits(values), bits(value))


@pytest.mark.parametrize("dim", [16, 64, 128, 256])
def test_gaussian_rows_of_bf16_are_not_raw(dim: int) -> None:
    """Were they, every read would take their 16 bits: what the residual is for would be lost."""
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, 1, 500, dim, generator=generator).bfloat16() for _ in range(2))
    *_, scale = held(key, value)
    assert bool(torch.isfinite(scale).all())


def exact_intervals(rows: torch.Tensor, half: float) -> Intervals:
    """As if codes had said each number itself."""
    return Intervals.around(rows.float(), torch.full(rows.shape[:-1], half))


def test_fields_are_as_wide_as_their_numbers_need() -> None:
    """A number of [1, 2) within 1/64 lies among 4 of bfloat16, and one of [2, 4) among 2; nothing escapes."""
    rows = torch.linspace(1.1, 1.9, 16).bfloat16()[None]
    found = encode_fields(rows, exact_intervals(rows, 1 / 64))
    assert (found.width.item(), int(found.escaped.sum()), found.size.item()) == (2, 0, 4)
    assert encode_fields(2 * rows, exact_intervals(2 * rows, 1 / 64)).width.item() == 1


def test_numbers_near_zero_escape_and_cost_a_byte() -> None:
    rows = torch.linspace(1.1, 1.9, 16).bfloat16()[None]
    rows[0, 3], rows[0, 5], rows[0, 7] = 0.0, -0.0, -0.001
    intervals = exact_intervals(rows, 1 / 64)
    found = encode_fields(rows, intervals)
    assert found.escaped.nonzero()[:, 1].tolist() == [3, 5, 7]
    assert bool(found.codable)
    data, fits = pack_fields(found, found, torch.zeros(1, 2, dtype=torch.int64), 32)
    assert bool(fits)
    for decoded in decode_fields(data, (intervals, intervals)):
        assert torch.equal(bits(decoded), bits(rows))
    size = PREFIX_BYTES + 2 * int(found.size)
    assert not bool(pack_fields(found, found, torch.zeros(1, 2, dtype=torch.int64), size - 1)[1])


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 2**20 - 1)), min_size=1, max_size=30), st.integers(0, 15))
def test_bits_come_out_of_bytes_as_they_went_in(fields: list[tuple[int, int]], start: int) -> None:
    taken = torch.tensor([[start, *(bits for bits, _ in fields)]])
    numbers = torch.tensor([[0, *(number & (1 << bits) - 1 for bits, number in fields)]])
    data = packed_bits(numbers, taken, -(-int(taken.sum()) // 8))
    assert torch.equal(unpacked_bits(data, taken[:, 1:], start), numbers[:, 1:])
    assert torch.equal(unpacked_bits(data, taken[:, 1:], torch.tensor([start])), numbers[:, 1:])


@given(st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_ordered_bits_order_numbers(dtype: torch.dtype, seed: int) -> None:
    numbers = torch.randn(50, generator=torch.Generator().manual_seed(seed)).to(dtype).sort().values
    order = ordered_bits(numbers)
    assert bool((order[1:] >= order[:-1]).all())
    assert torch.equal(bits(from_ordered_bits(order, dtype)), bits(numbers))


@pytest.mark.parametrize("storage", ["8bit", "4bit+"])
def test_rows_without_a_residual_are_within_half_a_step(storage: str) -> None:
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, 2, 600, 64, generator=generator) for _ in range(2))
    _, values, _ = held(key, value, storage)
    step = value.abs().amax(-1, keepdim=True) * (16 / 15) * (17 / 16) / 128
    steps = torch.full((600, 1), 1.0 if storage == "8bit" else 16.0)
    steps[:128] = steps[-128:] = 1.0  # the window at either end
    error = (values - value).abs() / (step * steps)
    assert error.max() <= 0.5 + 1e-3
    assert error[:, :, 128:-128].max() > 0.4
