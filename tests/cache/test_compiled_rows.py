"""Many rows at once go through generated code; what cannot be compiled goes through eager code, and says so once."""

from __future__ import annotations

import logging

import pytest
import torch

from alignedkv_compile.arena_memory import zeroed_arena
from alignedkv_compile.cache import rows as cache_rows
from alignedkv_compile.layout import ArenaLayout
from alignedkv_compile.storage import EIGHT_BIT

ROWS, DIM = 64, 16


@pytest.fixture(autouse=True)
def _few_rows_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_rows, "COMPILED_ROWS", 1)
    monkeypatch.setattr(cache_rows, "_KERNELS", cache_rows.Kernels())


def _held(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal rows, and what an ``8bit`` cache gives back of them."""
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, 2, ROWS, DIM, generator=generator).to(dtype) for _ in range(2))
    planes = zeroed_arena(ArenaLayout(2, ROWS, DIM, DIM, EIGHT_BIT, dtype.itemsize).total, key.device)
    positions = torch.arange(ROWS)
    cache_rows.store(planes, key, value, positions, ROWS, EIGHT_BIT.name)
    none = torch.empty(0, dtype=torch.int64)
    held, _ = cache_rows.load(planes, key[:, :, :0], value[:, :, :0], none, ROWS, ROWS, EIGHT_BIT.name)
    return key, held


def test_rows_of_one_dtype_that_cannot_be_compiled_leave_the_others_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiled: list[torch.dtype] = []

    def compile_alone(function, args, *rest):  # noqa: ANN001, ANN002 - as own_kernels has it
        if args[1].dtype == torch.float16:
            raise RuntimeError("no half floats here")
        compiled.append(args[1].dtype)
        return original(function, args, *rest)

    original = cache_rows.compile_alone
    monkeypatch.setattr(cache_rows, "compile_alone", compile_alone)
    with caplog.at_level(logging.WARNING, logger=cache_rows.__name__):
        for dtype in (torch.float16, torch.bfloat16, torch.float16):
            key, held = _held(dtype)
            assert float((held - key).abs().max()) < 0.05
    assert compiled == [torch.bfloat16, torch.bfloat16], "to store and to load"
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2, "once to store and once to load"
    assert all("8bit" in text and "torch.float16" in text and "no half floats here" in text for text in said)
