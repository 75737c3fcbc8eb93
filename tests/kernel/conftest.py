"""Forcing an instruction set on the generated C++."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import NATIVE_ISAS

from alignedkv_compile import lowering
from alignedkv_compile.lowering.cpp_kernel import Template
from alignedkv_compile.lowering.isa import ENVIRONMENT_VARIABLE

EMULATION = Path(__file__).parent / "avx512_emulation.h"
INSTRUCTION_SETS = ("avx512", "avx2", "portable")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of tests that go over cases and instruction sets, `make test` takes each case with one set, in turn.

    A set that is emulated, which takes long to compile, is taken for the first case only; others get the best of this machine.
    """
    cases: dict[object, list[object]] = {}
    for item in items:
        chosen = dict(item.callspec.params) if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if (isa := chosen.pop("isa", None)) and chosen:
            seen = cases.setdefault(item.function, [])  # type: ignore[attr-defined]
            if chosen not in seen:
                seen.append(chosen)
            place = seen.index(chosen)
            turn = INSTRUCTION_SETS[place % len(INSTRUCTION_SETS)]
            if isa != (turn if turn in NATIVE_ISAS or not place else NATIVE_ISAS[0]):
                item.add_marker(pytest.mark.slow)


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Kernels are generated for this instruction set; AVX-512 is emulated on a machine without it."""
    name: str = request.param
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, name)
    if name not in NATIVE_ISAS:
        if name != "avx512":
            pytest.skip(f"this machine has no {name}, and nothing here emulates it")
        native, native_hash = Template.includes, lowering.source_hash
        monkeypatch.setattr(Template, "includes", lambda self: native(self) + EMULATION.read_text())
        monkeypatch.setattr(lowering, "source_hash", lambda: native_hash() + EMULATION.read_bytes())
    torch._dynamo.reset()
    yield name
    torch._dynamo.reset()
