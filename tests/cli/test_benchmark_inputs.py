"""The attention benchmark's inputs are what its documentation says, and its script runs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def inputs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("attention_inputs", BENCHMARKS / "attention_inputs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("target", [16.0, 128.0])
def test_synthetic_attention_is_as_peaked_as_asked(inputs: ModuleType, dtype: torch.dtype, target: float):
    layer = inputs.synthetic(inputs.Shape(6, 2, 32), 1024, dtype, target)
    assert layer.query.shape == (1, 6, 1, 32)
    assert layer.key.shape == layer.value.shape == (1, 2, 1024, 32)
    assert {tensor.dtype for tensor in (layer.query, layer.key, layer.value)} == {dtype}
    # The scale is found before the query is rounded to 16 bits.
    assert inputs.effective_keys(layer) == pytest.approx(target, rel=0.02)


def test_layers_like_a_model_are_described_as_they_were_made(inputs: ModuleType):
    layers = [inputs.made_up(inputs.Shape(9, 3, 32), 1024, torch.bfloat16, seed) for seed in range(8)]
    assert layers[0].query.shape == (1, 9, 1, 32)
    assert {tensor.dtype for tensor in (layers[0].query, layers[0].key, layers[0].value)} == {torch.bfloat16}
    found = inputs.peakedness(layers)
    assert found.median_keys == pytest.approx(inputs.model_like.MEDIAN_KEYS, rel=0.15)
    assert found.median_keys < found.mean_keys < found.most_keys
    assert found.correlation == pytest.approx(inputs.model_like.SHARED_DIRECTION, abs=0.15)
    assert found.shared_value == pytest.approx(inputs.model_like.SHARED_VALUE, abs=0.05)
    assert "effective keys" in str(found)


def test_independent_layers_share_nothing(inputs: ModuleType):
    found = inputs.peakedness([inputs.synthetic(inputs.Shape(6, 2, 32), 1024, torch.float32, 64.0)])
    assert abs(found.correlation) < 0.2
    assert found.shared_value < 0.01


def test_exact_attention_is_softmax_attention_per_group(inputs: ModuleType):
    layer = inputs.synthetic(inputs.Shape(6, 2, 32), 64, torch.float32, 16.0)
    expected = torch.nn.functional.scaled_dot_product_attention(
        layer.query.double(), layer.key.double(), layer.value.double(), enable_gqa=True
    )
    torch.testing.assert_close(inputs.exact_attention(layer), expected, rtol=1e-12, atol=1e-12)


def test_captured_layers_survive_the_file(inputs: ModuleType, tmp_path: Path):
    layer = inputs.synthetic(inputs.Shape(6, 2, 32), 64, torch.bfloat16, 16.0)
    torch.save({"query": [layer.query], "key": [layer.key], "value": [layer.value]}, tmp_path / "kv.pt")
    (loaded,) = inputs.captured(tmp_path / "kv.pt")
    assert torch.equal(loaded.query, layer.query)
    assert loaded.shape == inputs.Shape(6, 2, 32)
    torch.save({"other": layer.query}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"capture\.py"):
        inputs.captured(tmp_path / "other.pt")


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "attention.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_script_measures_every_variant(tmp_path: Path):
    path, table = tmp_path / "attention.json", tmp_path / "attention.md"
    arguments = ["--contexts", "256", "--shapes", "4/2/32", "--dtypes", "bfloat16", "--rounds", "1"]
    arguments += ["--burst-ms", "0", "--footprint-mib", "0", "--keys", "16", "--json", str(path), "--markdown", str(table)]
    result = run_script(*arguments)
    assert result.returncode == 0, result.stderr
    (case,) = json.loads(path.read_text())["cases"]
    assert set(case["ratios"]) == {"aligned", "stream", "default", "sdpa packed", "sdpa repeated", "sdpa enable_gqa"}
    for variant in case["variants"].values():
        assert variant["median_ms"] > 0
        assert variant["relative_error"] < 0.02
    assert case["variants"]["stream"]["bytes_fraction"] == 1.0
    assert table.read_text().splitlines()[2].startswith("| 4/2/32 | 256 | bf16 | ")


def test_script_refuses_bad_shapes():
    result = run_script("--shapes", "5/2/32", "--contexts", "64")
    assert result.returncode != 0
    assert "multiple of KV heads" in result.stderr + result.stdout


def test_kinds_of_inputs_are_those_that_there_are(inputs: ModuleType):
    shape, dtype = inputs.Shape(6, 2, 32), torch.float32
    layers = {kind: inputs.layer_of(kind, shape, 64, dtype, 16.0) for kind in (inputs.MODEL, inputs.INDEPENDENT)}
    assert torch.equal(layers[inputs.MODEL].value, inputs.made_up(shape, 64, dtype).value)
    assert torch.equal(layers[inputs.INDEPENDENT].value, inputs.synthetic(shape, 64, dtype, 16.0).value)
    result = run_script("--inputs", "random", "--shapes", "6/2/32", "--contexts", "64")
    assert result.returncode != 0
    assert "none of model, independent" in result.stderr + result.stdout
