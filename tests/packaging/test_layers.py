"""The direction of imports, read from the sources: what CONTRIBUTING.md says may import what, and no cycles."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "alignedkv_compile"

KNOWN_CYCLES: frozenset[tuple[str, str]] = frozenset()
"""Imports (importer, imported) that still close a cycle."""

DEFERRED: Mapping[tuple[str, str], str] = {}
"""Imports inside functions that may close a cycle, each with the reason."""

MAY_NOT: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("layout", "row_header", "precision", "worst_case", "ops", "options", "errors"), ("passes", "lowering")),
    **dict.fromkeys(("arena", "reference"), ("passes", "lowering")),
    **dict.fromkeys(("contract", "reasons", "report", "logs", "statistics"), ("passes", "lowering", "runtime", "backend")),
    "state": ("passes", "lowering", "contract", "own_kernels", "plane_builder", "runtime", "backend"),
    **dict.fromkeys(("own_kernels", "plane_builder"), ("passes", "runtime", "backend")),
    "runtime": ("passes", "backend", "metrics"),
    "metrics": ("passes", "lowering", "runtime", "backend"),
    "lowering": ("passes", "reference", "backend", "runtime"),
    "passes": ("lowering", "reference", "own_kernels", "plane_builder", "runtime", "backend"),
}
"""First parts of module names, and those that they never import, not even in a function; ``reference`` is all of its files."""


def sources() -> dict[str, Path]:
    """Modules by the name under which they are imported."""
    found = {}
    for folder, prefix in ((PACKAGE, ()), ("passes", (PACKAGE,)), ("lowering", (PACKAGE,))):
        for path in (ROOT / folder).rglob("*.py"):
            parts = [*prefix, *path.relative_to(ROOT).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOURCES = sources()


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports below a node, but for those that only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from statements(other)
        else:
            yield from statements(child)


def imported_names(module: str, statement: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """What a statement names, absolutely."""
    if isinstance(statement, ast.Import):
        yield from (alias.name for alias in statement.names)
        return
    base = statement.module or ""
    if statement.level:
        parts = module.split(".") if SOURCES[module].name == "__init__.py" else module.split(".")[:-1]
        parts = parts[: len(parts) - statement.level + 1]
        base = ".".join([*parts, *([statement.module] if statement.module else [])])
    for alias in statement.names:
        yield f"{base}.{alias.name}"


def imports(module: str) -> set[str]:
    """Modules of the package that ``module`` imports, with the packages around them that this runs first."""
    found = set()
    for statement in statements(ast.parse(SOURCES[module].read_text())):
        for name in imported_names(module, statement):
            while name and name not in SOURCES:
                name = name.rpartition(".")[0]
            while name and name != PACKAGE and not f"{module}.".startswith(f"{name}."):
                found.add(name)
                name = name.rpartition(".")[0]
    return found


GRAPH = {module: imports(module) for module in SOURCES}


def layer(module: str) -> str:
    """The first part of a module's name in the package; ``reference_head`` and the like are ``reference``."""
    first = f"{module}.".split(".")[1]
    return "reference" if first.startswith("reference") else first


def test_the_search_finds_what_it_should():
    assert f"{PACKAGE}.layout" in GRAPH[f"{PACKAGE}.arena"]
    assert {f"{PACKAGE}.ops", f"{PACKAGE}.lowering.isa"} <= GRAPH[f"{PACKAGE}.lowering.attention"] | GRAPH[
        f"{PACKAGE}.lowering"
    ]
    assert f"{PACKAGE}.passes" in GRAPH[f"{PACKAGE}.backend"]
    assert {layer(module) for module in SOURCES} >= set(MAY_NOT)


@pytest.mark.parametrize("module", sorted(module for module in SOURCES if layer(module) in MAY_NOT))
def test_imports_point_one_way(module: str):
    wrong = {name for name in GRAPH[module] if layer(name) in MAY_NOT[layer(module)]}
    assert not {name for name in wrong if (module, name) not in KNOWN_CYCLES}


def test_no_module_imports_itself_through_others():
    excused = {*KNOWN_CYCLES, *DEFERRED}
    graph = {module: {name for name in names if (module, name) not in excused} for module, names in GRAPH.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_every_exception_is_still_needed():
    assert all(name in GRAPH[module] for module, name in {*KNOWN_CYCLES, *DEFERRED})


TABLE_ROW = re.compile(r"^\| (`[^|]*`) \| [^|]* \|([^|]*)\|$", re.MULTILINE)


def named_layers(cell: str) -> set[str]:
    """The layers that a cell of CONTRIBUTING.md's table names in backticks."""
    return {name.rstrip("/*") for name in re.findall(r"`([^`]+)`", cell)}


def documented_imports() -> list[tuple[set[str], set[str]]]:
    """For each row of the table: its layers, and what they import of others."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text[text.index("| modules of `alignedkv_compile` |") : text.index("The table is exact")]
    return [(named_layers(modules), named_layers(names)) for modules, names in TABLE_ROW.findall(table)]


def test_contributing_names_every_layer_once():
    rows = [layers for layers, _ in documented_imports()]
    assert sorted(name for layers in rows for name in layers) == sorted({layer(module) for module in SOURCES} - {""})


@pytest.mark.parametrize(("layers", "expected"), documented_imports(), ids=lambda names: "+".join(sorted(names)) or "nothing")
def test_contributing_says_what_each_layer_imports(layers: set[str], expected: set[str]):
    found = {layer(name) for module in SOURCES if layer(module) in layers for name in GRAPH[module]}
    assert found - layers == expected
