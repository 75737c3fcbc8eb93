"""What a comparison of models runs, and what it found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..demo.environment import Environment
from ..demo.result import Result, Settings


@dataclass(frozen=True)
class ModelResult:
    """One model.

    Attributes:
        source: as given: a Hugging Face name, a folder, a ``.gguf`` file or ``smollm2``.
        result: what was measured, or None.
        failed: why not, or "".
    """

    source: str
    result: Result | None
    failed: str = ""


@dataclass(frozen=True)
class SuiteResult:
    """All models, in the order given."""

    settings: Settings
    dtype: str
    environment: Environment
    models: tuple[ModelResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data; a model's ``result`` is what ``alignedkv demo --json`` writes."""
        return {
            "settings": asdict(self.settings) | {"dtype": self.dtype},
            "environment": asdict(self.environment),
            "models": [
                {
                    "source": entry.source,
                    "failed": entry.failed,
                    "result": None if entry.result is None else entry.result.to_dict(),
                }
                for entry in self.models
            ],
        }

    def write(self, path: Path) -> None:
        """Write :meth:`to_dict` as JSON to ``path``, making its folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2, default=str) + "\n")

    @property
    def failures(self) -> Sequence[ModelResult]:
        """Models that could not be measured."""
        return [entry for entry in self.models if entry.failed]
