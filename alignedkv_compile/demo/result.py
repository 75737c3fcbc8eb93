"""What the demo runs, and what it found."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .document import Document
from .environment import Environment
from .measure import BytesRead, Comparison, calls_per_comparison
from .quality import Continuation, Quality

STATIC, DYNAMIC = "static", "dynamic"
CAPACITY_STEP = 128
"""A StaticCache's length is rounded up to a multiple of this."""


@dataclass(frozen=True)
class Settings:
    """What the demo runs.

    Attributes:
        contexts: tokens in the cache before decoding; the longest is also where accuracy is measured.
        caches: cache classes, of "static" and "dynamic".
        tokens: timed decode steps per variant, context and cache class.
        positions: teacher-forced positions.
        continuation: greedily decoded tokens.
        tolerance: the backend's option.
        threads: of torch's intra-op pool; None leaves torch's default.
        min_context: the backend's option.
    """

    contexts: tuple[int, ...] = (2048, 7936)
    caches: tuple[str, ...] = (STATIC, DYNAMIC)
    tokens: int = 32
    positions: int = 256
    continuation: int = 32
    tolerance: float = 2.0
    threads: int | None = None
    min_context: int | None = None

    def following(self) -> int:
        """Tokens of the document that are decoded after a context."""
        return max(calls_per_comparison(self.tokens), self.positions + 1, self.continuation)

    def capacity(self, context: int) -> int:
        """``max_cache_len`` of a StaticCache for ``context``: one length for all measurements, since another recompiles."""
        rows = max(calls_per_comparison(self.tokens), self.continuation)
        if context == max(self.contexts):
            rows = max(rows, self.positions)
        return -(-(context + rows) // CAPACITY_STEP) * CAPACITY_STEP


QUICK = Settings(contexts=(2048,), caches=(STATIC,), tokens=24, positions=32)


@dataclass(frozen=True)
class Result:
    """Everything the demo found; :meth:`write` saves it as JSON."""

    model: str
    document: Document
    settings: Settings
    environment: Environment
    comparisons: tuple[Comparison, ...]
    qualities: tuple[Quality, ...]
    continuations: tuple[Continuation, ...]
    report: Any

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the derived figures spelled out."""
        return {
            "model": self.model,
            "document": {
                "modules": self.document.modules,
                "sha256": self.document.sha256,
                "tokens": self.document.tokens.shape[1],
            },
            "settings": asdict(self.settings),
            "environment": asdict(self.environment),
            "comparisons": [_comparison_dict(comparison) for comparison in self.comparisons],
            "quality": [asdict(quality) for quality in self.qualities],
            "continuations": [asdict(continuation) for continuation in self.continuations],
            "report": self.report.to_dict(),
        }

    def write(self, path: Path) -> None:
        """Write :meth:`to_dict` to ``path``, making its folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2, default=str) + "\n")


def _comparison_dict(comparison: Comparison) -> dict[str, Any]:
    return {
        "cache": comparison.cache,
        "context": comparison.context,
        "timings": [
            asdict(timing) | {"median_ms": timing.median_ms, "tokens_per_second": timing.tokens_per_second}
            for timing in comparison.timings
        ],
        "best_stock": comparison.best_stock,
        "bytes": None if comparison.bytes is None else _bytes_dict(comparison.bytes),
    }


def _bytes_dict(found: BytesRead) -> dict[str, Any]:
    return {name: getattr(found, name) for name in ("bytes_read", "bytes_full", "fraction", "read_by_step", "full_by_step")}
