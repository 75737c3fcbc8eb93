"""What `alignedkv eval` runs, and what it found."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..demo.environment import Environment
from .equal_bytes import EqualBytes
from .scores import Score


@dataclass(frozen=True)
class Settings:
    """What is evaluated.

    Attributes:
        model: see :func:`~alignedkv_compile.evaluate.loading.load_model`.
        text: see :func:`~alignedkv_compile.evaluate.texts.read_text`.
        dtype: of the model and its cache: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        contexts: tokens in the cache before the positions that are compared.
        positions: teacher-forced positions at each context.
        tolerances: the sweep.
        probes: positions at which attention is compared with float64.
        compare: Python file with other methods, or None.
        threads: of torch's intra-op pool; None leaves its default.
    """

    model: str = "smollm2"
    text: str = "code"
    dtype: str = "bfloat16"
    contexts: tuple[int, ...] = (2048,)
    positions: int = 256
    tolerances: tuple[float, ...] = (1.0, 2.0, 4.0)
    probes: int = 8
    compare: Path | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Result:
    """Everything that an evaluation found; :meth:`write` saves it as JSON.

    Attributes:
        settings: what was asked for.
        model: the model's name in tables.
        text_sha256: of the text that was tokenized.
        environment: where it ran.
        nll_reference: mean negative log-likelihood of the fp32 model, by context.
        scores: stock, the sweep and the compared methods at every context.
        equal_bytes: compared methods against the sweep at their bytes.
        violations: lines of :func:`~alignedkv_compile.evaluate.gates.violations`.
    """

    settings: Settings
    model: str
    text_sha256: str
    environment: Environment
    nll_reference: dict[int, float]
    scores: tuple[Score, ...]
    equal_bytes: tuple[EqualBytes, ...]
    violations: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def at(self, context: int) -> tuple[Score, ...]:
        """Scores at one context."""
        return tuple(score for score in self.scores if score.context == context)

    def write(self, path: Path) -> None:
        """Write :meth:`to_dict` as JSON to ``path``, making its folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2, default=str) + "\n")
