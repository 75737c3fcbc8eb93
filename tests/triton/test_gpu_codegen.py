"""Machine code for a GPU that is not there: nothing spills, and loads stay wide. One target here;
``make gpu-codegen`` has five."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_codegen.py"
KERNELS = ("quantize_on_write", "prepare", "score", "coarse", "thresholds", "refine", "exact", "values", "stream", "combine")
WIDE_LOADS = {"score": 10, "coarse": 8, "refine": 4, "exact": 8, "values": 8, "stream": 9}
"""So many 16-byte loads at least: the planes' rows (64 bytes at this head dimension), scores, scales, K and V themselves."""
NARROW_LOADS = {"score": 0, "stream": 0}
"""Loads below 4 bytes at most. The other kernels also read flags, one byte per row."""


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Figures of each kernel for head dimension 128 on sm_90, for both dtypes. From a process
    of its own: the stand-in for CUDA undoes nothing."""
    path = tmp_path_factory.mktemp("codegen") / "figures.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    options = ["--targets", "sm_90", "--dims", "128", "--dtype", request.param, "--json", str(path)]
    command = [sys.executable, str(PROGRAM), *options]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return {entry["kernel"]: entry for entry in json.loads(path.read_text())}


def test_every_kernel_compiles_and_none_spills(compiled: dict[str, dict[str, Any]]) -> None:
    assert set(KERNELS) <= set(compiled)
    assert {name: entry["spilled_bytes"] for name, entry in compiled.items() if entry["spilled_bytes"]} == {}


def test_loads_are_wide(compiled: dict[str, dict[str, Any]]) -> None:
    for name, number in WIDE_LOADS.items():
        assert compiled[name]["loads"].get("16", 0) >= number, name
    for name, number in NARROW_LOADS.items():
        loads = compiled[name]["loads"]
        assert sum(count for width, count in loads.items() if int(width) < 4) <= number, name


def test_products_use_tensor_cores(compiled: dict[str, dict[str, Any]], request: pytest.FixtureRequest) -> None:
    cache = {"bfloat16": ".bf16", "float16": ".f16"}[request.node.callspec.params["compiled"]]
    assert any("s8" in name for name in compiled["score"]["tensor_core"]), "scores come from int8 products"
    assert any("tf32" in name for name in compiled["values"]["tensor_core"])
    assert any(cache in name for name in compiled["stream"]["tensor_core"])
