"""Private names of torch are used in two files only, so that a new release of torch is the work of two files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {"alignedkv_compile/torch_private.py", "alignedkv_compile/inductor_private.py"}
SOURCES = sorted(
    path.relative_to(ROOT) for folder in ("alignedkv_compile", "lowering", "passes") for path in (ROOT / folder).rglob("*.py")
)


def is_private(name: str) -> bool:
    """Whether a dotted name is torch's own business: a part of it begins with ``_``, or torch calls it experimental."""
    first, *rest = name.split(".")
    return first == "torch" and any(
        (part.startswith("_") and not part.startswith("__")) or part == "experimental" for part in rest
    )


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of an attribute access, or an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def private_names(source: str) -> Iterator[str]:
    """Each use of a private name of torch."""
    for node in ast.walk(ast.parse(source)):
        names = [dotted(node)]
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from filter(is_private, names)


def test_the_search_finds_what_it_should():
    assert set(private_names("import torch._inductor.ir")) == {"torch._inductor.ir"}
    assert set(private_names("def f():\n    from torch import _dynamo")) == {"torch._dynamo"}
    assert set(private_names("import torch\ntorch._inductor.config.patch()")) >= {"torch._inductor.config.patch"}
    assert set(private_names("from torch.fx.experimental.symbolic_shapes import ShapeEnv"))
    assert not set(private_names("import torch\nfrom torch.fx import Graph\nprint(torch.__version__, torch.compiler.config)"))


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_private_names_are_used_in_two_files(path: Path):
    found = set(private_names((ROOT / path).read_text()))
    assert bool(found) == (path.as_posix() in ALLOWED), found
