"""Limits that a user of a GPU meets: no GPU, and a cache beyond 32-bit indexing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from triton_interpreter import interpreted

import alignedkv_compile
from alignedkv_compile.errors import CacheTooLongError
from alignedkv_compile.layout import BLOCK_ROWS, ArenaLayout
from alignedkv_compile.passes.caches import append


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmark_refuses_without_a_gpu() -> None:
    program = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"
    result = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "needs a CUDA or ROCm GPU" in result.stderr
    assert not result.stdout


def _step(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keys, values = torch.cat([keys, key], -2), torch.cat([values, value], -2)
    return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True), keys, values


def test_a_growing_cache_beyond_32_bit_indexing_is_an_error_and_never_a_wrong_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(append, "MAX_INDEX", ArenaLayout(2, BLOCK_ROWS, 16, 16).total)  # one block of rows
    query, key, value = torch.randn(1, 4, 1, 16), *torch.randn(2, 1, 2, 1, 16)
    past = [torch.randn(1, 2, 40, 16) for _ in range(2)]
    compiled = torch.compile(_step, backend="alignedkv", options={"strict": True})
    with interpreted(), torch.no_grad(), pytest.raises(CacheTooLongError, match=f"addresses {BLOCK_ROWS} at most"):
        compiled(query, key, value, *past)


def test_a_bound_on_every_output_is_declined_and_stock_attention_stays() -> None:
    inputs = torch.randn(1, 4, 1, 16), *(torch.randn(1, 2, rows, 16) for rows in (1, 1, 40, 40))
    compiled = torch.compile(_step, backend="alignedkv", options={"guarantee": "worst_case", "min_context": 0})
    with interpreted(), torch.no_grad():
        output, *_ = compiled(*inputs)
    (site,) = alignedkv_compile.report().graphs[0].sites
    assert site.reason == "guarantee='worst_case' has generated C++ only; this cache is on cpu"
    torch.testing.assert_close(output, _step(*inputs)[0], rtol=1e-5, atol=1e-5)


def test_without_triton_nothing_is_lost_on_cpus() -> None:
    """The lowerings register, and compile for the CPU, where triton cannot be imported."""
    program = """
import sys
sys.modules["triton"] = None
import torch
import alignedkv_compile.lowering as lowering
lowering.register()
assert not any("lowering.triton" in name for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
