"""Forcing an instruction set on the generated C++."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cases import NATIVE_ISAS

from alignedkv_compile import lowering
from alignedkv_compile.lowering.cpp_kernel import Template
from alignedkv_compile.lowering.isa import ENVIRONMENT_VARIABLE

EMULATIONS = {name: Path(__file__).parent / f"{name}_emulation.h" for name in ("avx512", "amx")}
INSTRUCTION_SETS = ("avx512", "avx2", "portable")
"""Of most tests. AMX differs in one way of streaming, which test_tiles.py is about."""


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
            best = next(name for name in INSTRUCTION_SETS if name in NATIVE_ISAS)
            if isa != (turn if turn in NATIVE_ISAS or not place else best):
                item.add_marker(pytest.mark.slow)


@contextmanager
def _kernels_for(
    name: str, monkeypatch: pytest.MonkeyPatch, native_isas: tuple[str, ...] = NATIVE_ISAS, edit: tuple[str, str] = ("", "")
) -> Iterator[str]:
    """``edit`` replaces text of the emulation of what is missing among ``native_isas``."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, name)
    if name not in native_isas:
        needed = ("avx512", "amx") if name == "amx" else (name,)
        missing = [EMULATIONS[part] for part in needed if part in EMULATIONS and part not in native_isas]
        if not missing:
            pytest.skip(f"this machine has no {name}, and nothing here emulates it")
        native, native_hash = Template.includes, lowering.source_hash
        text = "".join(path.read_text() for path in missing)
        assert edit[0] in text
        text = text.replace(*edit) if edit[0] else text
        monkeypatch.setattr(Template, "includes", lambda self: native(self) + text)
        monkeypatch.setattr(lowering, "source_hash", lambda: native_hash() + text.encode())
    torch._dynamo.reset()
    yield name
    torch._dynamo.reset()


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Kernels are generated for this instruction set; AVX-512 is emulated on a machine without it."""
    with _kernels_for(request.param, monkeypatch) as name:
        yield name


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Kernels are generated for AMX, which is emulated on a machine without it."""
    with _kernels_for("amx", monkeypatch) as name:
        yield name


@pytest.fixture
def amx_denied(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Kernels are generated for AMX, which the process may not have."""
    others = tuple(name for name in NATIVE_ISAS if name != "amx")
    denial = "permitted() { return true; }", "permitted() { return false; }"
    with _kernels_for("amx", monkeypatch, others, denial) as name:
        yield name
