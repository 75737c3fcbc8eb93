"""What is copied, pickled or saved of a growing cache after compiled steps: its live rows, as with stock."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("transformers")
from safetensors.torch import load, save
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig, MistralConfig, StaticCache

import alignedkv_compile
from alignedkv_compile.errors import CacheTypeError
from alignedkv_compile.state.append_buffers import AppendBuffers

ROWS = 200
SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}


class NoPlanes:
    def rebuild(self, planes: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: int) -> None:
        raise AssertionError("no planes are asked for")


def filled(cache: DynamicCache, heads: int = 2) -> DynamicCache:
    """A cache whose tensors are what compiled steps leave: views of buffers."""
    buffers = AppendBuffers(NoPlanes())
    for layer in cache.layers:
        past = torch.randn(1, heads, ROWS - 1, 16), torch.randn(1, heads, ROWS - 1, 16)
        layer.lazy_initialization(*past)
        buffer = buffers.before_call(*past, 1, with_planes=False)
        for rows in (buffer.key, buffer.value):
            rows[:, :, ROWS - 1] = torch.randn(1, heads, 16)
        layer.keys, layer.values = buffers.after_call(buffer, 1)
        assert layer.keys.untyped_storage().nbytes() > layer.keys.nbytes
    return cache


def through_torch_save(cache: object) -> object:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_pickle(cache: object) -> object:
    return pickle.loads(pickle.dumps(cache))


WAYS = {"deepcopy": copy.deepcopy, "pickle": through_pickle, "torch.save": through_torch_save}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(
    "config", [LlamaConfig(**SHAPE), MistralConfig(**SHAPE, sliding_window=4096)], ids=["plain", "sliding"]
)
def test_copies_carry_the_live_rows(config: LlamaConfig, way: str, heads: int) -> None:
    cache = filled(DynamicCache(config=config), heads)
    copied = WAYS[way](cache)
    assert type(copied) is type(cache)
    for layer, other in zip(cache.layers, copied.layers, strict=True):
        assert type(layer) is type(other)
        assert vars(layer).keys() == vars(other).keys()
        for ours, theirs in ((layer.keys, other.keys), (layer.values, other.values)):
            assert torch.equal(ours, theirs)
            assert theirs.untyped_storage().nbytes() == ours.nbytes
            assert ours.data_ptr() != theirs.data_ptr()
    assert copied.get_seq_length() == cache.get_seq_length()


@pytest.mark.parametrize("dump", [pickle.dumps, lambda cache: _torch_bytes(cache)], ids=["pickle", "torch.save"])
def test_a_file_is_no_larger_than_stock_s(dump: Callable[[object], bytes]) -> None:
    cache = filled(DynamicCache(config=LlamaConfig(**SHAPE)))
    stock = DynamicCache(config=LlamaConfig(**SHAPE))
    for index, layer in enumerate(cache.layers):
        stock.update(layer.keys.contiguous(), layer.values.contiguous(), index)
    assert len(dump(cache)) <= 1.01 * len(dump(stock))


def _torch_bytes(cache: object) -> bytes:
    file = io.BytesIO()
    torch.save(cache, file)
    return file.getvalue()


@pytest.mark.parametrize("both", [False, True])
def test_compact_leaves_what_stock_leaves(both: bool) -> None:
    cache = filled(DynamicCache(config=LlamaConfig(**SHAPE)))
    values = [layer.keys.clone() for layer in cache.layers]
    alignedkv_compile.compact(EncoderDecoderCache(cache, DynamicCache(config=LlamaConfig(**SHAPE))) if both else cache)
    tensors = {f"{index}.keys": layer.keys for index, layer in enumerate(cache.layers)}
    loaded = load(save(tensors))
    for index, (layer, value) in enumerate(zip(cache.layers, values, strict=True)):
        assert torch.equal(layer.keys.view(-1), value.view(-1))
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
        assert torch.equal(loaded[f"{index}.keys"], value)


def test_compact_leaves_a_static_cache_alone() -> None:
    cache = StaticCache(config=LlamaConfig(**SHAPE), max_cache_len=32)
    cache.early_initialization(1, 2, 16, torch.float32, torch.device("cpu"))
    before = [layer.keys for layer in cache.layers]
    alignedkv_compile.compact(cache)
    assert all(layer.keys is keys for layer, keys in zip(cache.layers, before, strict=True))


def test_compact_says_what_it_takes() -> None:
    with pytest.raises(CacheTypeError, match=r"past_key_values.*") as raised:
        alignedkv_compile.compact(torch.zeros(3))
    assert isinstance(raised.value, TypeError)
    assert "a Tensor has none" in str(raised.value)
