"""The key under which Inductor caches our kernels changes with everything that decides their text."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignedkv_compile import lowering
from alignedkv_compile.lowering.isa import CHOICES, ENVIRONMENT_VARIABLE, TARGETS

EDITED = (
    *dict.fromkeys(name for target in TARGETS.values() for name in target.headers),
    *("isa.py", "vectors.h.jinja", "scan.py.jinja", "layout.py", "row_header.py", "precision.py", "worst_case.py", "ops.py"),
)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """The hash is computed once a process."""
    lowering._sources_digest.cache_clear()
    yield
    lowering._sources_digest.cache_clear()


@pytest.mark.parametrize("name", EDITED)
def test_an_edit_changes_the_hash(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = lowering.source_hash()
    (edited,) = (path for path in lowering.deciding_files() if path.name == name)
    copy = Path(shutil.copy(edited, tmp_path))
    copies = [copy if path == edited else path for path in lowering.deciding_files()]
    monkeypatch.setattr(lowering, "deciding_files", lambda: copies)
    lowering._sources_digest.cache_clear()
    assert lowering.source_hash() == before
    copy.write_text(copy.read_text() + "\n")
    lowering._sources_digest.cache_clear()
    assert lowering.source_hash() != before


def test_the_instruction_set_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = set()
    for name in CHOICES:
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, name)
        hashes.add(lowering.source_hash())
    assert len(hashes) == len(CHOICES)
