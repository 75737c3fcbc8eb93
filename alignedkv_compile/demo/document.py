"""A long real document that every machine has: the sources of Python's own library, in a fixed order."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .model import DemoUnavailableError, Tokenizer

MODULES = (
    "argparse",
    "inspect",
    "typing",
    "datetime",
    "tarfile",
    "turtle",
    "doctest",
    "subprocess",
    "zipfile",
    "difflib",
    "pickle",
    "smtplib",
)
"""Pure-Python modules of the standard library, concatenated until the document is long enough."""


@dataclass(frozen=True)
class Document:
    """Token ids of the document and where they come from.

    Attributes:
        tokens: int64 ``[1, N]``.
        modules: the modules whose sources were used.
        sha256: of the text that was tokenized; two machines with the same hash decode the same document.
    """

    tokens: torch.Tensor
    modules: tuple[str, ...]
    sha256: str


def sources() -> Iterator[tuple[str, str]]:
    """Name and source text of each of :data:`MODULES` that this interpreter ships as source."""
    for name in MODULES:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin) if spec is not None and spec.origin is not None else None
        if origin is not None and origin.suffix == ".py" and origin.is_file():
            yield name, origin.read_text(encoding="utf-8")


def long_document(tokenizer: Tokenizer, length: int) -> Document:
    """Exactly ``length`` tokens of library source.

    Raises:
        DemoUnavailableError: this Python installation ships too little source text.
    """
    digest, ids, used = hashlib.sha256(), list[int](), list[str]()
    for name, text in sources():
        digest.update(text.encode())
        ids += tokenizer.encode(text, add_special_tokens=False)
        used.append(name)
        if len(ids) >= length:
            return Document(torch.tensor([ids[:length]], dtype=torch.int64), tuple(used), digest.hexdigest())
    raise DemoUnavailableError(
        f"Python's library sources give {len(ids)} tokens on this machine, not {length}: choose smaller --contexts"
    )
