"""Texts to evaluate on: a file of the user's, or one of three that come with every Python and differ in kind.

``code`` is Python's own library sources, ``prose`` the English of the language reference (what ``pydoc``
shows for a topic), ``table`` the character tables of :mod:`encodings`: one row of hexadecimal numbers and a name after the
other. They depend on the version of Python, so every result carries the SHA-256 of what was tokenized.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..demo.document import sources
from ..demo.model import Tokenizer
from .errors import EvaluationError

TABLES = tuple(f"cp{page}" for page in (437, 850, 852, 855, 857, 858, 860, 861, 862, 863, 864, 865, 866, 869, 737, 775))
"""Modules of :mod:`encodings` whose decoding maps are rows of numbers and names; 437 and 850 alone fill 8192 tokens."""


@dataclass(frozen=True)
class Text:
    """Token ids and where they come from.

    Attributes:
        name: one of :data:`BUILTIN`, or the path as given.
        tokens: int64 ``[1, N]``.
        sha256: of the UTF-8 text that was tokenized.
    """

    name: str
    tokens: torch.Tensor
    sha256: str


def _code() -> Iterator[str]:
    for _, source in sources():
        yield source


def _prose() -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def _table() -> Iterator[str]:
    for name in TABLES:
        spec = importlib.util.find_spec(f"encodings.{name}")
        if spec is not None and spec.origin is not None and Path(spec.origin).is_file():
            source = Path(spec.origin).read_text(encoding="utf-8")
            yield source[source.find("decoding_map = ") :]


BUILTIN: Mapping[str, Callable[[], Iterator[str]]] = {"code": _code, "prose": _prose, "table": _table}
"""Names that :func:`read_text` takes, and the pieces of each text in order."""


def read_text(source: str, tokenizer: Tokenizer, length: int) -> Text:
    """The first ``length`` tokens of a text.

    Args:
        source: a name in :data:`BUILTIN`, or the path of a UTF-8 file.
        tokenizer: the model's.
        length: tokens wanted.

    Raises:
        EvaluationError: no such text, it is not UTF-8, or it is too short.
    """
    digest, ids = hashlib.sha256(), list[int]()
    for piece in BUILTIN[source]() if source in BUILTIN else _file(source):
        digest.update(piece.encode())
        ids += tokenizer.encode(piece, add_special_tokens=False)
        if len(ids) >= length:
            return Text(source, torch.tensor([ids[:length]], dtype=torch.int64), digest.hexdigest())
    raise EvaluationError(
        f"the text {source!r} has {len(ids)} tokens, not {length}: choose shorter --contexts or another --text"
    )


def _file(path: str) -> Iterator[str]:
    try:
        yield Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise EvaluationError(f"{path!r} is not UTF-8 text") from None
    except OSError as error:
        raise EvaluationError(
            f"cannot read the text {path!r} ({error.strerror}); it is a file, or one of {', '.join(BUILTIN)}"
        ) from None
