"""The zoo itself, and a class of each pattern of attention: pass-only, a kind of cache and a dtype each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.fx import GraphModule

pytest.importorskip("transformers")
import zoo_backend
from transformers import CONFIG_MAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from zoo_classes import GROUPS, ZooClass, generative_classes, select
from zoo_decode import Decoded
from zoo_figures import Status, figures, reasons, status
from zoo_models import tiny_config, tiny_model
from zoo_overrides import OVERRIDES
from zoo_page import page
from zoo_pool import Limits, run_tasks, tasks
from zoo_results import ClassResult, Combination, ResultFolder, Run, SiteCount, Verdict, from_json, source_version
from zoo_rules import HEAD_DIM, WINDOW, cap_of
from zoo_shrink import shrink
from zoo_verdict import judge
from zoo_worker import DTYPES, check_combinations, combinations

PATTERNS = {
    "LlamaForCausalLM": ("dynamic", "bfloat16", 2),  # the second step has symbolic lengths
    "MistralForCausalLM": ("static", "bfloat16", 6),  # sliding window, until it rolls
    "Gemma2ForCausalLM": ("dynamic", "bfloat16", 1),  # soft cap
    "Gemma3ForCausalLM": ("static", "float32", 1),
    "GPTJForCausalLM": ("static", "bfloat16", 1),  # matmul
    "BloomForCausalLM": ("dynamic", "float32", 1),  # baddbmm
    "XGLMForCausalLM": ("static", "bfloat16", 1),  # bmm
    "T5ForConditionalGeneration": ("static", "bfloat16", 1),  # position bias
    "WhisperForConditionalGeneration": ("dynamic", "bfloat16", 1),  # cross-attention
    "BartForConditionalGeneration": ("static", "float32", 1),
    "DeepseekV3ForCausalLM": ("static", "bfloat16", 1),  # latent attention
    "GptOssForCausalLM": ("static", "bfloat16", 1),  # sinks
    "BambaForCausalLM": ("static", "bfloat16", 1),  # state-space layers beside attention
    "Llama4ForCausalLM": ("dynamic", "bfloat16", 1),  # chunks
}
"""Kind of cache, dtype and steps: each graph takes a second or two, so the others are left to ``make zoo``."""


def named(name: str) -> ZooClass:
    return select(generative_classes(), [name])[0]


def run(
    name: str, kind: str, dtype: str, steps: int = 1, compile_graph: zoo_backend.CompileGraph = zoo_backend.pass_only
) -> list[Run]:
    with torch.no_grad():
        return check_combinations(tiny_model(named(name), DTYPES[dtype]), kind, dtype, compile_graph, steps)


@pytest.mark.parametrize("name", PATTERNS)
def test_each_pattern_gives_stock_s_result(name: str) -> None:
    for each in run(name, *PATTERNS[name]):
        assert each.verdict is Verdict.RIGHT, each
        assert each.sites
        assert not each.unseen


def test_bits_are_skipped_in_so_short_a_context() -> None:
    every_bit, default = run("OPTForCausalLM", "static", "bfloat16", 6)
    assert every_bit.every_site_rewritten
    assert default.every_site_rewritten
    assert default.rows_in_full is not None
    assert default.rows_in_full < 1


@pytest.mark.slow
def test_a_symbol_that_only_a_dropped_past_defines() -> None:
    """The past of GPT-OSS's first layer leaves the graph, and Dynamo passes its length under another symbol only."""
    for each in run("GptOssForCausalLM", "dynamic", "bfloat16", 2, zoo_backend.compiled):
        assert each.verdict is Verdict.RIGHT, each


def off_by_a_percent(
    gm: GraphModule, example_inputs: Sequence[object], options: Mapping[str, object]
) -> tuple[zoo_backend.Compiled, zoo_backend.GraphReport]:
    compiled, report = zoo_backend.pass_only(gm, example_inputs, options)

    def call(*inputs: object) -> list[object]:
        outputs = compiled(*inputs)
        return [one * 1.01 if isinstance(one, torch.Tensor) and one.is_floating_point() else one for one in outputs]

    return call, report


def forgets_the_last_row(
    gm: GraphModule, example_inputs: Sequence[object], options: Mapping[str, object]
) -> tuple[zoo_backend.Compiled, zoo_backend.GraphReport]:
    compiled, report = zoo_backend.pass_only(gm, example_inputs, options)

    def call(*inputs: object) -> Sequence[object]:
        caches = [one for one in inputs if isinstance(one, torch.Tensor) and one.dim() == 4 and one.is_contiguous()]
        before = [cache.clone() for cache in caches]
        outputs = compiled(*inputs)
        for cache, old in zip(caches, before, strict=True):
            cache.copy_(old)
        return outputs

    return call, report


def fails(
    gm: GraphModule, example_inputs: Sequence[object], options: Mapping[str, object]
) -> tuple[zoo_backend.Compiled, zoo_backend.GraphReport]:
    raise ValueError("a defect")


@pytest.mark.parametrize(
    ("defect", "verdict"),
    [(off_by_a_percent, "wrong"), pytest.param(forgets_the_last_row, "wrong", marks=pytest.mark.slow), (fails, "error")],
)
def test_a_defect_is_caught(defect: zoo_backend.CompileGraph, verdict: str) -> None:
    assert {each.verdict for each in run("OPTForCausalLM", "static", "float32", 1, defect)} == {verdict}


def test_a_second_draw_of_stock_counts_where_it_errs_more() -> None:
    def decoded(error: float) -> Decoded:
        return Decoded((torch.ones(1, 4, dtype=torch.float64) + error,), {})

    truth, stock, ours = decoded(0.0), decoded(1e-6), decoded(1e-5)
    assert not judge(ours, stock, truth, torch.float32).right
    assert judge(ours, stock, truth, torch.float32, decoded(5e-6)).right
    assert not judge(decoded(1e-4), stock, truth, torch.float32, decoded(5e-6)).right


def test_a_cache_that_nobody_reports_is_seen() -> None:
    for each in run("OPTForCausalLM", "static", "float32", 1, zoo_backend.stock):
        assert each.unseen == ("0", "1")
        assert not each.every_site_rewritten


def test_what_stock_cannot_do_is_not_held_against_us() -> None:
    runs = run("MiniMaxForCausalLM", "static", "float32")
    assert {each.verdict for each in runs} == {Verdict.NOT_ON_STOCK}
    assert "not compatible" in runs[0].message


def test_every_generative_class_is_listed_once() -> None:
    classes = generative_classes()
    assert len(classes) >= 300
    assert len({entry.name for entry in classes}) == len(classes)
    assert {entry.group for entry in classes} == set(GROUPS)
    assert named("llama").name == "LlamaForCausalLM"
    with pytest.raises(KeyError, match="nobody"):
        select(classes, ["nobody"])


def test_a_configuration_shrinks_to_one_layer_of_each_kind() -> None:
    small = shrink(CONFIG_MAPPING["gemma3_text"]().to_dict())
    assert small["num_hidden_layers"] == len(small["layer_types"]) == 2
    assert set(small["layer_types"]) == {"sliding_attention", "full_attention"}
    assert small["sliding_window"] == WINDOW


@pytest.mark.parametrize("model_type", ["llama", "qwen2_vl", "deepseek_v3", "gemma4", "whisper", "t5", "jamba"])
def test_no_entry_exceeds_its_cap(model_type: str) -> None:
    def check(config: Mapping[object, object]) -> None:
        for name, value in config.items():
            if isinstance(value, Mapping):
                check(value)
            elif isinstance(name, str) and isinstance(value, int) and not isinstance(value, bool):
                cap = cap_of(name)
                latent_or_larger_head = name == "head_dim" and value <= 2 * HEAD_DIM
                assert cap is None or value <= cap or latent_or_larger_head or name.startswith("num_"), (name, value)

    check(shrink(CONFIG_MAPPING[model_type]().to_dict()))


def test_rotary_sections_fill_half_a_head() -> None:
    assert sum(shrink({"mrope_section": [16, 24, 24]})["mrope_section"]) == HEAD_DIM // 2


def test_overrides_are_of_models_that_exist() -> None:
    assert set(OVERRIDES) <= set(CONFIG_MAPPING_NAMES)


def test_a_text_model_takes_its_own_configuration() -> None:
    assert tiny_config(named("Llama4ForCausalLM")).model_type == "llama4_text"


@pytest.fixture
def result() -> ClassResult:
    sites = (SiteCount("declined", "written by 3 others", 2, "layers.0"), SiteCount("rewritten", "", 2, "layers.1"))
    runs = [Run(each, Verdict.RIGHT, error=0.5, sites=sites[1:]) for each in combinations(["bfloat16", "float32"])]
    runs = [replace(each, sites=sites) if each.combination.cache == "dynamic" else each for each in runs]
    return ClassResult("AForCausalLM", "a", "causal", "v1", tuple(runs))


def test_results_survive_a_file(result: ClassResult) -> None:
    assert from_json(result.to_json()) == result


def test_only_what_is_missing_is_run(result: ClassResult, tmp_path: Path) -> None:
    folder = ResultFolder(tmp_path, "v1")
    entry, other = ZooClass("AForCausalLM", "a", "causal"), ZooClass("BForCausalLM", "b", "causal")
    half = replace(result, runs=tuple(each for each in result.runs if each.combination.dtype == "bfloat16"))
    dtypes = ["bfloat16", "float32"]
    folder.write(half)
    assert [(task.entry, task.dtypes) for task in tasks([entry, other], folder, dtypes)] == [
        (entry, ("float32",)),
        (other, ("bfloat16", "float32")),
    ]
    folder.write(result)
    assert [task.entry for task in tasks([entry, other], folder, dtypes)] == [other]
    assert [task.entry for task in tasks([entry], ResultFolder(tmp_path, "v2"), dtypes)] == [entry]
    folder.file("AForCausalLM").write_text("{")
    assert folder.read("AForCausalLM") is None
    folder.clear()
    assert not list(tmp_path.iterdir())


def test_the_version_follows_the_sources(tmp_path: Path) -> None:
    (tmp_path / "passes").mkdir()
    source = tmp_path / "passes" / "find.py"
    source.write_text("a = 1\n")
    before = source_version(compiled=False, root=tmp_path)
    source.write_text("a = 2\n")
    assert source_version(compiled=False, root=tmp_path) != before
    assert source_version(compiled=False, root=tmp_path) != source_version(compiled=True, root=tmp_path)


@pytest.mark.slow
def test_a_class_that_takes_too_long_is_an_error(tmp_path: Path) -> None:
    folder, entry = ResultFolder(tmp_path, "v1"), named("OPTForCausalLM")
    (task,) = tasks([entry], folder, ["float32"])
    (found,) = run_tasks([task], folder, Limits(0.01, 2**33), jobs=1, compiled=False)
    assert {each.verdict for each in found.runs} == {Verdict.ERROR}
    assert "not done after" in found.runs[0].message
    assert tasks([entry], folder, ["float32"]) == []


def test_figures_and_reasons(result: ClassResult) -> None:
    assert [status(result, kind) for kind in ("static", "dynamic")] == [Status.EVERY, Status.SOME]
    static = figures([result], "static")
    assert (static.on_stock, static.attention, static.every, static.share) == (1, 1, 1, 1.0)
    (reason,) = reasons([result], ("static", "dynamic"))
    assert reason.text == "written by N others"
    assert reason.classes == {"static": 0, "dynamic": 1}


def test_the_page_depends_on_the_results_alone(result: ClassResult) -> None:
    wrong = replace(result.runs[0], verdict=Verdict.WRONG, error=7.0, error_in="logits")
    lost = Run(Combination("dynamic", "bfloat16", 2.0), Verdict.NOT_ON_STOCK, "OSError: no /home/somebody/file")
    other = ClassResult("BForCausalLM", "b", "causal", "v1", (wrong, lost))
    text = page([result, other])
    assert text == page([other, result])
    assert "| AForCausalLM | every site | some sites | written by N others |" in text
    assert "| BForCausalLM, static, bfloat16, tolerance 0 | `logits: the error is 7 times its limit` |" in text
    assert "/home" not in text
    assert "2 classes: 2 in bfloat16, 1 in float32." in text
    assert "sources: v1 for 1 of them, v2 for 1 of them." in page([result, replace(other, version="v2")])
