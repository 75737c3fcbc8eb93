"""What README and docs claim about the code, where the code can be asked."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from alignedkv_compile import ops, torch_private
from alignedkv_compile.cli import app
from alignedkv_compile.compare.metrics import METRICS
from alignedkv_compile.layout import ArenaLayout
from alignedkv_compile.options import MODES, OPTION_NAMES, Options

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")
USAGE = (ROOT / "docs/usage.md").read_text(encoding="utf-8")
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path):
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{target}#{anchor}"


def test_the_options_of_the_readme_are_the_backends():
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", README, re.MULTILINE))
    assert set(rows) == set(OPTION_NAMES)
    defaults = {field.name: getattr(Options(), field.name) for field in fields(Options)}
    assert {name: text.strip('"') for name, text in rows.items()} == {name: str(defaults[name]) for name in rows}


def test_the_modes_of_the_docs_are_the_backends():
    (sentence,) = re.findall(r"`mode` is one of ([^;]+);", USAGE)
    assert tuple(re.findall(r"`([^`]+)`", sentence)) == MODES
    assert "names but `lite`" in README
    assert set(MODES) < set(torch_private.modes())
    if torch.__version__.startswith("2.13."):
        assert set(torch_private.modes()) == {*MODES, "lite"}


def test_the_memory_of_planes_is_what_is_said():
    shares = [ArenaLayout(8, 4096, dim, dim).total / (8 * 4096 * 2 * dim * 2) for dim in (64, 80, 128, 256)]
    text = f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %"
    for page in (README, USAGE, (ROOT / "docs/store.md").read_text(encoding="utf-8")):
        assert text in page


def test_there_are_as_many_operators_as_is_said():
    names = {name for name in vars(ops) if isinstance(getattr(ops, name), torch._ops.OpOverloadPacket)}
    assert len(names) == 8
    assert "eight operators" in (ROOT / "lowering/__init__.py").read_text(encoding="utf-8")
    assert not [page.name for page in PAGES if "two operators" in page.read_text(encoding="utf-8")]


def test_commands_in_the_docs_exist():
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for page in PAGES:
        named = re.findall(r"^(?:make \S+ )?alignedkv ([a-z][a-z-]*)", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(named) <= set(commands), page.name
    for name in commands:
        assert any(f"alignedkv {name}" in page.read_text(encoding="utf-8") for page in PAGES), name


def test_make_targets_in_the_docs_exist():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", page.read_text(encoding="utf-8"), re.MULTILINE))
        assert named <= targets, page.name


def test_the_best_stock_choice_is_the_smaller_time_of_each_row():
    rows = re.findall(r"\| [^|]+ \| ([\d.]+) ms \| ([\d.]+) ms \| ([\d.]+) ms \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", README)
    assert len(rows) == 12
    for eager, compiled, aligned, *gains in (tuple(map(float, row)) for row in rows):
        assert gains == pytest.approx([min(eager, compiled) / aligned, eager / aligned, compiled / aligned], rel=0.01)


def test_the_version_is_the_same_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[([^\]]+)\]", changelog, re.MULTILINE)[0] == "Unreleased"


def test_compares_metrics_are_documented_with_their_direction():
    table = dict(
        re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (lower|higher) \|", (ROOT / "docs/benchmarks.md").read_text(), re.MULTILINE)
    )
    documented = {name: direction for names, direction in table.items() for name in re.findall(r"`(\w+)`", names)}
    assert documented == {name: "higher" if metric.higher_is_better else "lower" for name, metric in METRICS.items()}


def test_files_for_other_tools_are_what_those_expect():
    yaml = pytest.importorskip("yaml")
    templates = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    assert {path.stem for path in templates} == {"bug", "config", "declined_site", "wrong_token"}
    for path in templates:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.stem != "config":
            assert {"name", "description", "body"} <= set(form)
            fields_ = [part for part in form["body"] if part["type"] != "markdown"]
            assert all(part["attributes"]["label"] for part in fields_)
            assert "environment" in [part["id"] for part in fields_]
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["id"] for hook in repository["hooks"]] == ["ruff-check", "ruff-format", "mypy"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"] == "Apache-2.0"
