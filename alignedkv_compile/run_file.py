"""The JSON that ``alignedkv demo``, ``eval``, ``bench-models``, ``make bench`` and others leave behind: read, told by kind."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import AlignedKVError


class RunFileError(AlignedKVError, ValueError):
    """A file that is no run's JSON, or that lacks what is asked of it; the message names the file."""


class Kind(enum.Enum):
    """What a run was; the value is what messages call it."""

    DEMO = "alignedkv demo"
    ATTENTION = "make bench"
    PEERS = "make bench-peers"
    EVAL = "alignedkv eval"
    CACHES = "alignedkv eval-caches"
    MODELS = "alignedkv bench-models"


_KNOWN_BY: Mapping[Kind, frozenset[str]] = {
    Kind.DEMO: frozenset({"comparisons", "quality"}),
    Kind.ATTENTION: frozenset({"plan", "cases"}),
    Kind.PEERS: frozenset({"peers", "cases"}),
    Kind.EVAL: frozenset({"scores", "nll_reference"}),
    Kind.CACHES: frozenset({"language", "retrieval"}),
    Kind.MODELS: frozenset({"models", "settings"}),
}
"""Entries that the JSON of this kind has, and no other."""


@dataclass(frozen=True)
class RunFile:
    """One file.

    Attributes:
        path: where it was read.
        kind: what the run was.
        data: its content.
    """

    path: Path
    kind: Kind
    data: Mapping[str, Any]

    @property
    def environment(self) -> Mapping[str, Any]:
        """Processor, instruction sets, threads and versions, see :class:`alignedkv_compile.demo.environment.Environment`."""
        found: Mapping[str, Any] = self.data["environment"]
        return found


def read_run(path: Path) -> RunFile:
    """Read a run's JSON.

    Raises:
        RunFileError: it cannot be read, is no JSON, or of no kind that is known.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunFileError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except ValueError as error:
        raise RunFileError(f"{str(path)!r} is not JSON: {error}") from None
    if isinstance(data, dict) and "environment" in data:
        for kind, entries in _KNOWN_BY.items():
            if entries <= data.keys():
                return RunFile(path, kind, data)
    kinds = ", ".join(f"`{kind.value}`" for kind in Kind)
    raise RunFileError(f"{str(path)!r} is not the JSON of a run that is known here: {kinds} write such files, with --json")
