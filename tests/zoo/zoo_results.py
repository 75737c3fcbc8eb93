"""What is known of a class after a run, and the files that keep it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("passes/**/*.py", "alignedkv_compile/*.py", "alignedkv_compile/state/*.py", "tests/zoo/*.py")
COMPILED_SOURCES = ("lowering/**/*.py", "lowering/**/*.jinja")
NOT_MEASURING = (
    "zoo.py",
    "zoo_child.py",
    "zoo_figures.py",
    "zoo_page.py",
    "zoo_pool.py",
    "zoo_table.py",
    "zoo_warm.py",
    "test_zoo.py",
)
"""Files of this folder that results do not depend on."""


class Verdict(StrEnum):
    """What became of one combination."""

    RIGHT = "right"
    WRONG = "wrong"
    ERROR = "error"
    """An exception that stock does not raise, or a process that ran out of time or memory."""
    NOT_ON_STOCK = "not on stock"
    """The class does not run with this cache without us either, eagerly or under ``torch.compile(backend="eager")``."""


@dataclass(frozen=True)
class Combination:
    """How a class is run: kind of cache, dtype, and tolerance."""

    cache: str
    dtype: str
    tolerance: float

    def __str__(self) -> str:
        return f"{self.cache}, {self.dtype}, tolerance {self.tolerance:g}"


@dataclass(frozen=True)
class SiteCount:
    """Lines of the reports that say the same: ``count`` over all graphs."""

    outcome: str
    reason: str
    count: int
    first: str


@dataclass(frozen=True)
class Run:
    """One combination's result.

    Attributes:
        verdict: see :class:`Verdict`.
        message: why, where it is not ``right``.
        error: largest error as a multiple of its limit, or None.
        error_in: what has that error.
        graphs: graphs that a decode step compiled to, recompilations included.
        sites: what became of the attention calls, grouped.
        unseen: layers whose keys and values a graph takes, but that no line of its report speaks of.
        notes: fallbacks and run-time notes.
        rows_in_full: share of the live rows of K and V that the aligned reads read to the last bit, or None where none were
            counted. Below 1, bits were skipped.
    """

    combination: Combination
    verdict: Verdict
    message: str = ""
    error: float | None = None
    error_in: str = ""
    graphs: int = 0
    sites: tuple[SiteCount, ...] = ()
    unseen: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    rows_in_full: float | None = None

    @property
    def ran_on_stock(self) -> bool:
        """Whether it says anything about us."""
        return self.verdict is not Verdict.NOT_ON_STOCK

    def count(self, outcome: str) -> int:
        """Sites with this outcome, over all graphs."""
        return sum(site.count for site in self.sites if site.outcome == outcome)

    @property
    def every_site_rewritten(self) -> bool:
        """Whether every cached attention call became an aligned read, and no cache went unseen."""
        return bool(self.sites) and self.count("rewritten") == sum(s.count for s in self.sites) and not self.unseen


@dataclass(frozen=True)
class ClassResult:
    """All runs of one class, and the version of the sources that they belong to."""

    name: str
    model_type: str
    group: str
    version: str
    runs: tuple[Run, ...]

    def of_cache(self, kind: str) -> tuple[Run, ...]:
        """The runs with one kind of cache."""
        return tuple(run for run in self.runs if run.combination.cache == kind)

    def to_json(self) -> str:
        """The inverse of :func:`from_json`."""
        return json.dumps(asdict(self), indent=1) + "\n"


def from_json(text: str) -> ClassResult:
    """Read what :meth:`ClassResult.to_json` wrote."""
    data = json.loads(text)
    return ClassResult(**{**data, "runs": tuple(map(_run, data["runs"]))})


def _run(data: Mapping[str, object]) -> Run:
    parsed = {
        **data,
        "combination": Combination(**data["combination"]),  # type: ignore[arg-type]
        "verdict": Verdict(str(data["verdict"])),
        "sites": tuple(SiteCount(**site) for site in data["sites"]),  # type: ignore[attr-defined]
        **{name: tuple(data[name]) for name in ("unseen", "notes")},  # type: ignore[arg-type]
    }
    return Run(**parsed)  # type: ignore[arg-type]


def source_version(*, compiled: bool, root: Path = ROOT) -> str:
    """A hash of everything that results depend on."""
    digest = hashlib.sha256(f"{torch.__version__} {transformers.__version__} {compiled}".encode())
    for pattern in (*SOURCES, *(COMPILED_SOURCES if compiled else ())):
        for path in sorted(root.glob(pattern)):
            if not (path.parent.name == "zoo" and path.name in NOT_MEASURING):
                digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class ResultFolder:
    """One JSON file per class; a file of another version than ``version`` counts as absent, if one is given."""

    def __init__(self, path: Path, version: str = "") -> None:
        self.path, self.version = path, version

    def file(self, name: str) -> Path:
        """Where the result of a class is."""
        return self.path / f"{name}.json"

    def write(self, result: ClassResult) -> None:
        """Keep a result; an interrupted write leaves the old one."""
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.file(result.name).with_suffix(".part")
        temporary.write_text(result.to_json())
        temporary.replace(self.file(result.name))

    def read(self, name: str) -> ClassResult | None:
        """The result of a class, if it is of this version."""
        try:
            result = from_json(self.file(name).read_text())
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return result if self.version in ("", result.version) else None

    def read_all(self, names: Iterable[str]) -> tuple[ClassResult, ...]:
        """Those that are there."""
        return tuple(result for name in names if (result := self.read(name)) is not None)

    def clear(self) -> None:
        """Start over."""
        for path in self.path.glob("*.json"):
            path.unlink()
