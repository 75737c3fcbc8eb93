"""Importing this module makes ``alignedkv_compile`` the checkout that it lies in, installed or not.

setuptools maps the top-level folders ``passes/`` and ``lowering/`` into the package (``[tool.setuptools.package-dir]``); here
a finder does the same, from the same table. The checkout goes before any installed copy. The backend's name, which an
installed package announces by an entry point, is registered by :func:`register_backend`.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


class SourceTree(importlib.abc.MetaPathFinder):
    """Finds the packages of the table; the modules inside them are found as ever.

    Args:
        root: of the checkout.
        folders: package to folder, as setuptools takes it.
    """

    def __init__(self, root: Path, folders: Mapping[str, str]) -> None:
        self._folders = {name: root / folder for name, folder in folders.items()}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        folder = self._folders.get(fullname)
        if folder is None:
            return None
        return importlib.util.spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def register_backend() -> None:
    """Make ``torch.compile(backend="alignedkv")`` find the backend, also where nothing is installed."""
    import torch

    from alignedkv_compile.backend import alignedkv

    if "alignedkv" not in torch.compiler.list_backends():
        torch._dynamo.register_backend(alignedkv, name="alignedkv")  # type: ignore[arg-type]  # it takes options too


def _install() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    if not any(type(finder).__name__ == SourceTree.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, SourceTree(ROOT, table))


_install()
