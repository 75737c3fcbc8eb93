"""What a built wheel holds: both top-level folders under their package name, the templates and the headers."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "alignedkv_compile", "passes", "lowering")


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Members of a wheel built from a copy of the sources (a build writes beside them)."""
    pytest.importorskip("setuptools")
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps", "--quiet", "-w", "dist"]
    subprocess.run(command, cwd=copy, check=True)
    (wheel,) = (copy / "dist").glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def in_tree(folder: str, suffix: str) -> set[str]:
    """Names, as a wheel would have them, of all files with ``suffix`` under a source folder."""
    prefix = "" if folder == "alignedkv_compile" else "alignedkv_compile/"
    return {prefix + path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(f"*{suffix}")}


@pytest.mark.parametrize("folder", ["alignedkv_compile", "passes", "lowering"])
def test_every_module_is_in_the_wheel(folder: str, names: set[str]):
    assert in_tree(folder, ".py") <= names


def test_every_template_and_header_is_in_the_wheel(names: set[str]):
    templates = in_tree("lowering", ".jinja") | in_tree("lowering", ".h")
    assert templates <= names


def test_no_bare_folder_and_no_tests_in_the_wheel(names: set[str]):
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"alignedkv_compile"}


def test_types_and_licence_are_in_the_wheel(names: set[str]):
    assert "alignedkv_compile/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
