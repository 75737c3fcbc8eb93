"""``docs/declined.md``: generated, complete, and with an anchor for every kind of reason that the passes give."""

from __future__ import annotations

import ast
from pathlib import Path

from alignedkv_compile import decline_page
from alignedkv_compile.reasons import PAGE, Reason

ROOT = Path(__file__).parents[2]


def test_the_page_is_up_to_date() -> None:
    assert (ROOT / PAGE).read_text(encoding="utf-8") == decline_page.render(), "run `make docs`"


def test_every_kind_has_a_section_and_is_given_somewhere() -> None:
    given = {
        node.attr
        for folder in ("passes", "alignedkv_compile")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "reasons.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Reason"
    }
    assert {reason.name for reason in Reason} <= given
    assert all(f"\n## {reason.value}\n" in decline_page.render() for reason in Reason)
