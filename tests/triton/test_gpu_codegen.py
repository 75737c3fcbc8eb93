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
pytestmark = pytest.mark.slow  # a minute and a half for a dtype; test_fake_gpu.py compiles for a GPU in `make test`

READ = ("scan", "finish", "repair", "scan masked", "finish masked", "repair masked")
PACKED = (
    *(f"{name} 8bit" for name in ("scan", "finish", "repair")),
    *(f"{name} 4bit+" for name in ("quantize_on_write", "finish", "repair")),
)
LOSSLESS = tuple(f"{name} lossless" for name in ("quantize_on_write", "raw", "scan", "finish", "repair"))
KERNELS = (*LOSSLESS, "quantize_on_write", *READ, *PACKED, "stream at tolerance 0", "combine at tolerance 0")
MOST_REGISTERS = {
    "scan": 144,
    "scan masked": 160,
    "finish": 176,
    "finish masked": 176,
    "repair": 128,
    "stream at tolerance 0": 128,
}
"""With 128 of them a multiprocessor holds four programs of 4 warps, with 168 three; ptxas takes more than it needs."""
WIDE_LOADS = {"scan": 4, "finish": 16}
"""So many 16-byte loads at least, beside the asynchronous copies of pipelined loops: the planes' rows (64 bytes at this head
dimension), parts, K and V themselves."""
PROTOTYPE_LOOP = 393
"""Instructions of the prototype's loop over 128 rows of K, which beat cuDNN on an H200 (docs/gpu.md)."""


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


def test_registers_leave_room_for_several_programs(compiled: dict[str, dict[str, Any]]) -> None:
    assert {
        name: compiled[name]["registers"] for name, most in MOST_REGISTERS.items() if compiled[name]["registers"] > most
    } == {}


def test_the_scan_takes_no_more_instructions_per_row_than_the_prototype(compiled: dict[str, dict[str, Any]]) -> None:
    for name, most in (("scan", PROTOTYPE_LOOP), ("scan masked", 1.1 * PROTOTYPE_LOOP)):
        assert compiled[name]["warps"] == 4
        assert 0 < compiled[name]["loop_instructions"] <= most, name


def test_loads_are_wide(compiled: dict[str, dict[str, Any]]) -> None:
    for name, number in WIDE_LOADS.items():
        assert compiled[name]["loads"].get("16", 0) >= number, name


def test_products_use_tensor_cores(compiled: dict[str, dict[str, Any]], request: pytest.FixtureRequest) -> None:
    cache = {"bfloat16": ".bf16", "float16": ".f16"}[request.node.callspec.params["compiled"]]
    assert any("s8" in name for name in compiled["scan"]["tensor_core"]), "scores come from int8 products"
    assert any("bf16" in name for name in compiled["finish"]["tensor_core"]), "planes of V are whole numbers in bfloat16"
    assert any(cache in name for name in compiled["stream at tolerance 0"]["tensor_core"])
