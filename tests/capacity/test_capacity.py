"""`alignedkv capacity`: caches that are allocated hold the bytes that were predicted, and one block more does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

import alignedkv_compile
from alignedkv_compile import cli
from alignedkv_compile.capacity.errors import CapacityError
from alignedkv_compile.capacity.memory import format_memory, parse_memory
from alignedkv_compile.capacity.result import find_capacity, most_rows
from alignedkv_compile.capacity.shapes import ModelShape, find_shapes, load_config
from alignedkv_compile.capacity.storages import BESIDE_DYNAMIC, BESIDE_STATIC, DYNAMIC, STATIC, STORAGE_KINDS, tensor_bytes
from alignedkv_compile.layout import BLOCK_ROWS
from alignedkv_compile.state.append_buffers import AppendBuffers
from alignedkv_compile.state.joined import JoinedKeys, LatentBuffers
from alignedkv_compile.state.sidecar import SidecarStore
from alignedkv_compile.state.windows import Windows
from alignedkv_compile.storage import PACKED

BATCH, MEMORY = 2, 1 << 20
SMALL = {"hidden_size": 64, "intermediate_size": 32, "vocab_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "head_dim": 32},
    "gemma3_text": {
        "num_key_value_heads": 1,
        "head_dim": 32,
        "sliding_window": 100,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "deepseek_v3": {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "q_lora_rank": 16},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "num_key_value_heads": 2, "num_experts": 2},
}


def config_of(name: str) -> Any:
    return AutoConfig.for_model(name, **SMALL, **CONFIGS[name])


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> ModelShape:
    return find_shapes(config_of(request.param), request.param, torch.bfloat16, BATCH)


class Builder:
    """Planes that say nothing."""

    def rebuild(self, planes: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: int) -> None: ...


def rows_of(shape: Any, count: int) -> list[torch.Tensor]:
    return [torch.zeros(*like.shape[:2], count, like.shape[3], dtype=like.dtype) for like in (shape.key, shape.value)]


def filled(cache: Any, model: ModelShape, count: int) -> Any:
    """``count`` rows in every layer, the last one at a decode step of its own; states of linear attention as they come."""
    for layer, shape in zip(cache.layers, model.layers, strict=True):
        if shape.key is None:
            continue
        for new in (count - 1, 1):
            if new:
                layer.update(*rows_of(shape, new))
    return cache


def held_by_cache(cache: Any, model: ModelShape) -> int:
    return tensor_bytes(cache) + sum(shape.constant for shape in model.layers)


def held_beside_static(model: ModelShape, rows: int) -> int:
    """What the stores of the run time allocate beside a StaticCache."""
    cache = filled(StaticCache(config=model.config, max_cache_len=rows), model, 1)
    held = held_by_cache(cache, model)
    builder = Builder()
    for layer in cache.layers:
        if not isinstance(getattr(layer, "keys", None), torch.Tensor):
            continue
        key, value = layer.keys, layer.values
        if layer.is_sliding:
            window = Windows(builder).before_call(key, value, 1, with_planes=True, trust_unversioned=False)
            assert window.planes is not None
            held += window.key.nbytes + window.value.nbytes + window.planes.nbytes
        elif model.name == "deepseek_v3":
            joined = JoinedKeys(builder).before_call(key, value, with_planes=True, trust_unversioned=False)
            assert joined.planes is not None
            held += joined.rows.nbytes + joined.planes.nbytes
        else:
            held += SidecarStore(builder).before_call(key, value).planes.nbytes
    return held


def held_beside_dynamic(model: ModelShape, rows: int) -> int:
    """What the run time's buffers take when they have just been made for ``rows`` rows."""
    held = sum(shape.constant for shape in model.layers)
    for layer, shape in zip(DynamicCache(config=model.config).layers, model.layers, strict=True):
        if shape.key is None:
            continue
        live = min(rows, layer.sliding_window) if layer.is_sliding else rows
        buffers = (LatentBuffers if model.name == "deepseek_v3" else AppendBuffers)(Builder())
        buffer = buffers.before_call(*rows_of(shape, live - 1), 1, with_planes=True)
        assert buffer.planes is not None
        held += buffer.key.nbytes + buffer.value.nbytes + buffer.planes.nbytes
    return held


def held(name: str, model: ModelShape, rows: int) -> int:
    """Bytes of a cache that is really made."""
    if name == STATIC:
        return held_by_cache(filled(StaticCache(config=model.config, max_cache_len=rows), model, rows), model)
    if name == DYNAMIC:
        return held_by_cache(filled(DynamicCache(config=model.config), model, rows), model)
    if name == BESIDE_STATIC:
        return held_beside_static(model, rows)
    if name == BESIDE_DYNAMIC:
        return held_beside_dynamic(model, rows)
    cache = alignedkv_compile.Cache(model.config, name, rows)
    for layer, shape in zip(cache.layers, model.layers, strict=True):
        if shape.key is not None:
            layer.lazy_initialization(*rows_of(shape, 1))
    return held_by_cache(cache, model)


def test_caches_hold_what_was_predicted_and_one_block_more_does_not_fit(model: ModelShape):
    capacity = find_capacity(model, MEMORY)
    assert [fit.storage for fit in capacity.fits] == [kind.name for kind in STORAGE_KINDS]
    for fit in capacity.fits:
        assert fit.tokens is not None
        assert fit.tokens > BLOCK_ROWS, fit
        assert held(fit.storage, model, fit.tokens) == fit.held <= MEMORY, fit
        assert held(fit.storage, model, fit.tokens + 1) > MEMORY, fit
        assert held(fit.storage, model, fit.tokens + BLOCK_ROWS) > MEMORY, fit


def test_the_modes_hold_the_more_the_fewer_bits_they_keep():
    model = find_shapes(config_of("llama"), "llama", torch.float16, 1)
    fits = {fit.storage: fit for fit in find_capacity(model, 8 << 20).fits}
    assert fits[BESIDE_DYNAMIC].tokens < fits[BESIDE_STATIC].tokens < fits[STATIC].tokens
    assert 0.9 < fits["lossless"].over_stock <= 1.0
    assert 1.6 < fits["8bit"].over_stock < 2.0 < 2.7 < fits["4bit+"].over_stock < 4.0
    twice = find_shapes(config_of("llama"), "llama", torch.float16, 2)
    again = {fit.storage: fit for fit in find_capacity(twice, 8 << 20).fits}
    assert again[STATIC].tokens == fits[STATIC].tokens // 2
    assert [name for name in fits if name in PACKED] == list(PACKED)


def test_states_of_linear_attention_do_not_grow():
    config = AutoConfig.for_model("falcon_mamba", hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=32)
    model = find_shapes(config, "falcon_mamba", torch.bfloat16, 1)
    cache, token = DynamicCache(config=config), torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()(input_ids=token, cache_params=cache)
    for fit in find_capacity(model, MEMORY).fits:
        assert fit.tokens is None
        assert fit.held == tensor_bytes(cache) > 0
    assert all(fit.tokens == 0 for fit in find_capacity(model, 10).fits)


def test_search_finds_the_last_that_fits():
    held = lambda rows: -(-rows // 128) * 1000  # noqa: E731
    assert most_rows(held, 999) == 0
    assert most_rows(held, 1000) == most_rows(held, 1999) == 128
    assert most_rows(held, 57_000) == 57 * 128
    assert most_rows(lambda rows: 5, 5) is None


@pytest.mark.parametrize(
    ("text", "size"), [("16GiB", 16 << 30), ("80 GB", 80 * 10**9), ("1.5kib", 1536), ("4096", 4096), ("3B", 3)]
)
def test_memory_sizes(text: str, size: int):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "16 gigabytes", "-1GiB", "0", "1e9"])
def test_what_is_no_memory_size_is_refused(text: str):
    with pytest.raises(CapacityError):
        parse_memory(text)


def test_memory_is_written_in_the_unit_that_fits():
    assert [format_memory(size) for size in (12, 2048, 3 << 20, 5 << 40)] == ["12 B", "2.00 KiB", "3.00 MiB", "5.00 TiB"]


def test_what_cannot_be_read_or_run_is_refused(tmp_path: Path):
    with pytest.raises(CapacityError, match="transformers cannot read a config from"):
        load_config(str(tmp_path))
    with pytest.raises(CapacityError, match="cannot run a CLIPVisionConfig without weights"):
        find_shapes(AutoConfig.for_model("clip_vision_model"), "clip", torch.float32, 1)
    model = find_shapes(config_of("llama"), "llama", torch.float32, 1)
    with pytest.raises(CapacityError, match="weights of llama alone take"):
        find_capacity(model, 100, with_weights=True)


def test_command_line(tmp_path: Path):
    runner = CliRunner()
    config_of("llama").to_json_file(tmp_path / "config.json")
    saved = tmp_path / "deep" / "capacity.json"
    arguments = ["capacity", str(tmp_path / "config.json"), "--memory", "1MiB", "--batch", "2", "--json", str(saved)]
    done = runner.invoke(cli.app, [*arguments, "--with-weights"])
    assert done.exit_code == 0, done.output
    assert "each of 2 sequences" in done.output
    found = json.loads(saved.read_text())
    model = find_shapes(config_of("llama"), "llama", torch.bfloat16, 2)
    expected = find_capacity(model, 1 << 20, with_weights=True)
    assert [fit["tokens"] for fit in found["fits"]] == [fit.tokens for fit in expected.fits]
    assert found["weights"] == model.weights > 0
    assert runner.invoke(cli.app, ["capacity", "x", "--memory", "1GiB", "--dtype", "int4"]).exit_code == 2
    refused = runner.invoke(cli.app, ["capacity", str(tmp_path), "--memory", "lots"])
    assert refused.exit_code == 1
    assert "no size of memory such as 16GiB" in " ".join(refused.output.split())
