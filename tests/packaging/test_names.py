"""One name per module: ``passes/`` and ``lowering/`` exist only as subpackages of ``alignedkv_compile``."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
import alignedkv_compile

def walk(package):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if module.name.rpartition(".")[2].startswith("_"):
            continue
        loaded = importlib.import_module(module.name)
        if module.ispkg:
            walk(loaded)

for name in ("", ".passes", ".lowering", ".lowering.templates"):
    walk(importlib.import_module("alignedkv_compile" + name))
ours = sorted(name for name in sys.modules if name.partition(".")[0] in ("alignedkv_compile", "passes", "lowering"))
print(*ours, sep="\\n")
"""


def run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run ``program`` in a fresh interpreter whose first import path is ``folder``."""
    return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["passes", "lowering"])
def test_bare_name_cannot_be_imported(name: str, tmp_path: Path):
    result = run(f"import {name}", tmp_path)
    assert result.returncode != 0
    assert "ModuleNotFoundError" in result.stderr


@pytest.mark.parametrize("where", ["elsewhere", pytest.param("repository", marks=pytest.mark.slow)])
def test_importing_everything_registers_nothing_under_a_bare_name(where: str, tmp_path: Path):
    """In the repository's root a bare ``import passes`` would find the folder: nothing may do it."""
    folder = tmp_path if where == "elsewhere" else Path(__file__).parents[2]
    result = run(IMPORT_EVERYTHING, folder)
    assert result.returncode == 0, result.stderr
    names = result.stdout.split()
    assert {"alignedkv_compile.passes", "alignedkv_compile.passes.records", "alignedkv_compile.lowering"} <= set(names)
    assert not [name for name in names if name.partition(".")[0] != "alignedkv_compile"]


def test_entry_points_point_at_what_exists():
    found = {(point.group, point.name): point.value for point in metadata.distribution("alignedkv-compile").entry_points}
    assert found["torch_dynamo_backends", "alignedkv"] == "alignedkv_compile.backend:alignedkv"
    assert found["console_scripts", "alignedkv"] == "alignedkv_compile.cli:app"
    for point in metadata.distribution("alignedkv-compile").entry_points:
        assert callable(point.load())


def test_torch_lists_the_backend_without_importing_it(tmp_path: Path):
    program = "import sys, torch\nprint('alignedkv' in torch.compiler.list_backends(), 'alignedkv_compile' in sys.modules)"
    result = run(program, tmp_path)
    assert result.stdout.split() == ["True", "False"], result.stderr
