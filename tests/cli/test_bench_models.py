"""`alignedkv bench-models` over tiny random models in local folders."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from run_samples import MACHINE, demo_result
from typer.testing import CliRunner
from zoo_backend import pass_only

pytest.importorskip("transformers")
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from alignedkv_compile.bench_models.result import ModelResult, SuiteResult
from alignedkv_compile.bench_models.table import HEADS, rows, write_markdown
from alignedkv_compile.cli import app
from alignedkv_compile.compare.quantities import quantities
from alignedkv_compile.demo import run as demo_run
from alignedkv_compile.demo.result import Settings
from alignedkv_compile.demo.variants import ALIGNED, COMPILED, EAGER, Variant
from alignedkv_compile.plots.series import HeatMap, extract
from alignedkv_compile.report import REGISTRY
from alignedkv_compile.run_file import read_run

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 256,
    "head_dim": 32,
}
FEW = ["--contexts", "600", "--tokens", "2", "--positions", "2"]


def save(folder: Path, kind: str = "llama", layers: int = 1, positions: int = 1024) -> str:
    """A random model and a tokenizer of bytes in ``folder``."""
    torch.manual_seed(0)
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[kind]
    model(config(**SIZES, num_hidden_layers=layers, max_position_embeddings=positions)).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return str(folder)


def bench(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench-models", *arguments], env={"COLUMNS": "250"})


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes and runtime are the product's; eager kernels stand in for Inductor's, which takes a minute to compile."""

    @contextmanager
    def variants(model: Any, options: Mapping[str, object]) -> Iterator[tuple[Variant, ...]]:
        def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[object]) -> Any:
            run, report = pass_only(gm, example_inputs, options)
            REGISTRY.add(report)
            return run

        yield Variant(EAGER, model), Variant(COMPILED, model), Variant(ALIGNED, torch.compile(model, backend=backend))

    monkeypatch.setattr(demo_run, "stock_and_aligned", variants)
    monkeypatch.setattr(demo_run, "warm_up_compiler", lambda: None)


@pytest.mark.usefixtures("without_inductor")
def test_a_model_that_cannot_be_measured_does_not_keep_others_from_it(tmp_path: Path):
    good, short = save(tmp_path / "good"), save(tmp_path / "short", positions=512)
    table, saved = tmp_path / "out/models.md", tmp_path / "out/models.json"
    found = bench(short, good, str(tmp_path / "absent"), *FEW, "--json", str(saved), "--markdown", str(table))
    assert found.exit_code == 1, found.output
    data = json.loads(saved.read_text())
    assert [entry["source"] for entry in data["models"]] == [short, good, str(tmp_path / "absent")]
    assert "was made for 512 tokens" in data["models"][0]["failed"]
    assert "transformers cannot load" in data["models"][2]["failed"]
    result = data["models"][1]["result"]
    assert result["report"]["rewritten"] == 1
    (comparison,) = result["comparisons"]
    assert [timing["variant"] for timing in comparison["timings"]] == [EAGER, COMPILED, ALIGNED]
    counted = comparison["bytes"]
    assert [len(step) for step in counted["read_by_step"]] == [1, 1]
    rows_after = [600 + 1 + 2 + 1, 600 + 1 + 2 + 2]
    assert counted["full_by_step"] == [[2 * 32 * 2 * length] for length in rows_after]
    assert 0 < counted["fraction"] < 0.9
    assert counted["bytes_read"] == sum(map(sum, counted["read_by_step"]))
    assert {quality["variant"]: quality["bytes"] < 0.9 for quality in result["quality"]} == {
        EAGER: False,
        COMPILED: False,
        ALIGNED: True,
    }
    text = table.read_text()
    assert text.count(f"| {good} | 600, static |") == 1
    assert f"| {short} | not measured |" in text
    assert f"Not measured: {short}: {short} was made for 512 tokens" in text
    assert "| 1 of 1 |" in text
    run = read_run(saved)
    assert {quantity.subject.split()[0] for quantity in quantities(run)} == {good}
    (heat,) = [one for one in extract(run).series if isinstance(one, HeatMap)]
    assert len(heat.shares) == 1
    assert len(heat.shares[0]) == 2


@pytest.mark.slow
def test_two_models_beside_torch_compile(tmp_path: Path):
    first, second = save(tmp_path / "first", layers=2), save(tmp_path / "second", "qwen3", layers=2)
    saved = tmp_path / "models.json"
    found = bench(first, second, *FEW, "--caches", "static,dynamic", "--json", str(saved))
    assert found.exit_code == 0, found.output
    entries = json.loads(saved.read_text())["models"]
    assert [[c["cache"] for c in entry["result"]["comparisons"]] for entry in entries] == [["static", "dynamic"]] * 2
    assert all(entry["result"]["report"]["declined"] == 0 for entry in entries)
    assert all(entry["result"]["report"]["rewritten"] >= 4 for entry in entries)
    for entry in entries:
        static, _ = entry["result"]["comparisons"]
        held = {timing["variant"]: timing["held_bytes"][-1] for timing in static["timings"]}
        assert held[EAGER] == held[COMPILED]
        assert 1.4 * held[EAGER] < held[ALIGNED] < 1.7 * held[EAGER]
        assert 0 < static["bytes"]["fraction"] < 1


def suite(*failed: str) -> SuiteResult:
    entries = (ModelResult("first|model", demo_result()), *(ModelResult("second", None, reason) for reason in failed))
    return SuiteResult(Settings(contexts=(1000, 3000)), "bfloat16", MACHINE, entries)


def test_the_table_leads_with_the_gain_over_the_best_stock_choice(tmp_path: Path):
    found = list(rows(suite("it raised\nand said | so")))
    assert [len(row) for row in found] == [len(HEADS)] * 3
    short, long, failed = (dict(zip(HEADS, row, strict=True)) for row in found)
    assert short["context, cache"] == "1000, static"
    assert (long["eager, ms"], long["torch.compile, ms"], long["alignedkv, ms"]) == ("40.0", "70.0", "18.0")
    assert long["times best stock"] == "2.22"
    assert (short["KL"], long["KL"]) == ("", "4.0e-04 -> 5.0e-04")
    assert long["rewritten"] == "6 of 6"
    assert (failed["model"], failed["context, cache"]) == ("second", "not measured")
    write_markdown(suite("it raised\nand said | so"), tmp_path / "table.md")
    lines = (tmp_path / "table.md").read_text().splitlines()
    cells = [line for line in lines if line.startswith("|")]
    assert len(cells) == 5
    assert {line.replace("\\|", "").count("|") for line in cells} == {len(HEADS) + 1}
    assert lines[-1] == "Not measured: second: it raised and said | so"
    assert lines[0].startswith("A Processor, 2 cores, 2 threads, ATen AVX2, kernels avx2, torch 2.13.0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int4"], "none of bfloat16"),
        (["--caches", "static,paged"], "not a list of static and dynamic"),
        (["--contexts", "2k"], "not a list of numbers"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], message: str):
    found = bench("model", *arguments)
    assert found.exit_code == 2
    assert message in " ".join(found.output.split())
