"""A packed cache does to its rows what transformers' caches do to theirs, holds few bytes, and refuses what it cannot hold."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, LlamaConfig, StaticCache

import alignedkv_compile
from alignedkv_compile.errors import CacheRowsError, OptionValueError
from alignedkv_compile.state.usage import cache_usage
from alignedkv_compile.storage import PACKED

CONFIG = LlamaConfig(
    hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=32
)
DIM = 64
LIMITS = {"lossless": 1.06, "8bit": 0.56, "4bit+": 0.35}
"""Bytes held over those of a 16-bit cache; of ``4bit+`` from 1024 rows on."""


def new_rows(
    count: int, batch: int = 3, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """K and V of each layer."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(batch, 2, count, DIM, generator=generator).to(dtype) for _ in range(4)]
    return [(made[0], made[1]), (made[2], made[3])]


def write(cache: Any, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [cache.update(key, value, layer) for layer, (key, value) in enumerate(rows)]


def both(room: int | None = None) -> tuple[Any, Any]:
    """A lossless cache and stock's, with the same 20 and 7 rows."""
    ours = alignedkv_compile.Cache(CONFIG, "lossless", room)
    stock = DynamicCache(config=CONFIG) if room is None else StaticCache(config=CONFIG, max_cache_len=room)
    for cache in (ours, stock):
        write(cache, new_rows(20))
        write(cache, new_rows(7, seed=1))
    return ours, stock


def assert_equal(ours: Any, stock: Any) -> None:
    for mine, theirs in zip(ours.layers, stock.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)
    assert int(ours.get_seq_length()) == int(stock.get_seq_length())


@pytest.mark.parametrize("room", [None, 40])
def test_rows_come_back(room: int | None) -> None:
    ours, stock = both(room)
    assert_equal(ours, stock)
    for mine, theirs in zip(write(ours, new_rows(2, seed=2)), write(stock, new_rows(2, seed=2)), strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])
    for query_rows in (1, 5):
        assert ours.get_mask_sizes(query_rows, 0) == stock.get_mask_sizes(query_rows, 0)
    assert ours.is_compileable == stock.is_compileable
    assert ours.get_max_length() == stock.get_max_length()


@pytest.mark.parametrize("room", [None, 40])
def test_beams_reorder_the_cache(room: int | None) -> None:
    ours, stock = both(room)
    order = torch.tensor([2, 0, 0])
    address = ours.layers[0].planes.data_ptr()
    for cache in (ours, stock):
        cache.reorder_cache(order)
        write(cache, new_rows(1, seed=3))
    assert_equal(ours, stock)
    assert ours.layers[0].planes.data_ptr() == address


def test_batch_entries_are_repeated_selected_and_cropped() -> None:
    ours, stock = both()
    for cache in (ours, stock):
        cache.batch_repeat_interleave(2)
        cache.crop(-5)
        cache.batch_select_indices(torch.tensor([0, 3, 5, 1]))
        write(cache, new_rows(9, batch=4, seed=4))
    assert_equal(ours, stock)
    for cache in (ours, stock):
        cache.batch_select_indices(torch.tensor([True, False, True, False]))
    assert_equal(ours, stock)
    with pytest.raises(ValueError, match="negative"):
        ours.crop(3)


@pytest.mark.parametrize("room", [None, 40])
def test_reset_empties_the_cache(room: int | None) -> None:
    ours, stock = both(room)
    for cache in (ours, stock):
        cache.reset()
        assert int(cache.get_seq_length()) == 0
        write(cache, new_rows(3, seed=5))
    assert_equal(ours, stock)


@pytest.mark.parametrize("room", [None, 40])
def test_copies_and_pickles_are_caches_of_their_own(room: int | None) -> None:
    ours, stock = both(room)
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(saved, weights_only=False)]
    write(ours, new_rows(4, seed=6))
    for one in copies:
        assert_equal(one, stock)
        write(one, new_rows(4, seed=6))
        assert_equal(one, ours)


def test_a_pickle_carries_live_rows_only() -> None:
    cache = alignedkv_compile.Cache(CONFIG, "8bit")
    write(cache, new_rows(5000, batch=1))
    assert len(pickle.dumps(cache)) < 1.03 * 2 * 2 * 5000 * (2 * DIM + 4 + (4 + 4 * DIM) / 128) + 20000


def test_planes_are_what_safetensors_takes(tmp_path: Path) -> None:
    ours, stock = both()
    path = tmp_path / "cache.safetensors"
    save_file({str(index): layer.planes for index, layer in enumerate(ours.layers)}, path)
    for index, layer in enumerate(ours.layers):
        layer.planes = load_file(path)[str(index)]
    assert_equal(ours, stock)


@pytest.mark.parametrize("mode", PACKED)
@pytest.mark.parametrize("rows", [1024, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (1500, 4096))])
@pytest.mark.parametrize("room", ["growing", pytest.param("static", marks=pytest.mark.slow)])
def test_held_bytes(mode: str, rows: int, room: str) -> None:
    """Of the storages themselves, after rows were appended one part at a time."""
    cache = alignedkv_compile.Cache(CONFIG, mode, None if room == "growing" else rows)
    parts = [rows - 130, *[10] * 13]
    for seed, count in enumerate(parts):
        write(cache, new_rows(count, batch=1, seed=seed))
        cache.get_seq_length()
    held = sum(layer.planes.untyped_storage().nbytes() for layer in cache.layers)
    assert held == cache.nbytes
    assert held <= LIMITS[mode] * 2 * 2 * 2 * rows * DIM * 2


def test_rows_after_a_crop_are_in_the_window_again() -> None:
    """More rows are removed than the window has: what comes then is held in 8 bits all the same."""
    cache = alignedkv_compile.Cache(CONFIG, "4bit+")
    write(cache, new_rows(600, batch=1, dtype=torch.float32))
    cache.crop(-300)
    new = new_rows(20, batch=1, seed=1, dtype=torch.float32)
    write(cache, new)
    value = new[0][1]
    step = value.abs().amax(-1, keepdim=True) * (16 / 15) * (17 / 16) / 128
    assert ((cache.layers[0].values[:, :, -20:] - value).abs() / step).max() <= 0.5 + 1e-3


def test_a_full_static_cache_says_so_and_stays_as_it_is() -> None:
    cache = alignedkv_compile.Cache(CONFIG, "8bit", 10)
    write(cache, new_rows(9))
    with pytest.raises(IndexError, match="10 rows"):
        write(cache, new_rows(2))
    assert int(cache.get_seq_length()) == 9


def test_what_cannot_be_held_is_refused() -> None:
    with pytest.raises(OptionValueError, match="lossless"):
        alignedkv_compile.Cache(CONFIG, "16bit")
    for room in (0, True, 2.5):
        with pytest.raises(OptionValueError, match="max_cache_len"):
            alignedkv_compile.Cache(CONFIG, "8bit", room)  # type: ignore[arg-type]
    with pytest.raises(CacheRowsError, match="float64"):
        write(alignedkv_compile.Cache(CONFIG), new_rows(2, dtype=torch.float64))
    with pytest.raises(CacheRowsError, match="rows of 4 numbers"):
        alignedkv_compile.Cache(CONFIG).update(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), 0)
    ours, _ = both()
    with pytest.raises(CacheRowsError, match="batch, heads"):
        write(ours, new_rows(1, batch=2))
    full = alignedkv_compile.Cache(CONFIG, "8bit", 10)
    with pytest.raises(IndexError, match="10 rows"):
        write(full, new_rows(11))


def test_metrics_see_what_is_held() -> None:
    ours, _ = both()
    records = {record.address: record for record in cache_usage()}
    for layer in ours.layers:
        record = records[layer.planes.data_ptr()]
        assert (record.kind, record.rows, record.capacity) == ("lossless", 27, layer.capacity)
        assert record.cache_bytes == layer.nbytes
    address = ours.layers[0].planes.data_ptr()
    del ours, layer
    gc.collect()
    assert address not in {record.address for record in cache_usage()}
