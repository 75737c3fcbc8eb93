"""What ``alignedkv eval-caches`` runs, and what it found."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...demo.environment import Environment


@dataclass(frozen=True)
class CacheSettings:
    """What is evaluated.

    Attributes:
        model: see :func:`~alignedkv_compile.evaluate.loading.load_model`.
        text: see :func:`~alignedkv_compile.evaluate.texts.read_text`.
        dtype: of the model and of what caches are given: ``"bfloat16"`` or ``"float16"``.
        contexts: rows of the cache at the last compared position.
        positions: compared positions of the text, at the end of each context.
        retrieval_contexts: rows of the cache when an answer to a retrieval question is complete.
        depths: where single needles lie, over the length of the text.
        kinds: names of the kinds of cache, None for all that are installed.
        slow_kinds: whether None means the slow ones too.
        keep: folder in which prefills are kept for another run, or None.
        threads: of torch's intra-op pool; None leaves its default.
    """

    model: str = "smollm2"
    text: str = "prose"
    dtype: str = "bfloat16"
    contexts: tuple[int, ...] = (2048, 8192)
    positions: int = 128
    retrieval_contexts: tuple[int, ...] = (4096, 8192)
    depths: tuple[float, ...] = (0.5,)
    kinds: tuple[str, ...] | None = None
    slow_kinds: bool = False
    keep: Path | None = None
    threads: int | None = None


FULL = CacheSettings(
    contexts=(2048, 8192, 32768), retrieval_contexts=(4096, 8192, 16384), depths=(0.1, 0.5, 0.9), slow_kinds=True
)
"""What ``--full`` runs."""


@dataclass(frozen=True)
class LanguageScore:
    """One kind of cache on a text. Logarithms are natural.

    Attributes:
        kind: its name.
        context: rows of the cache at the last position.
        held: bytes of the cache there.
        bytes: the same over stock's.
        perplexity: over the compared positions.
        kl_stock, kl_stock_error: KL(stock 16-bit || this), mean over positions and its standard error.
        kl_fp32, kl_fp32_error: KL(fp32 || this).
        flips: share of positions whose most likely token is not fp32's.
    """

    kind: str
    context: int
    held: int
    bytes: float
    perplexity: float
    kl_stock: float
    kl_stock_error: float
    kl_fp32: float
    kl_fp32_error: float
    flips: float


@dataclass(frozen=True)
class RetrievalScore:
    """One kind of cache on one retrieval task.

    Attributes:
        kind: its name.
        task: ``"needle"`` or ``"multi-key"``.
        context: rows of the cache at the end of an answer.
        held: bytes of the cache there, over stock's.
        questions: how many.
        right: how many answers greedy decoding gives exactly.
        right_fp32: the same of the fp32 model.
        lost: answers that stock 16-bit gives and this kind does not.
        nll: mean negative log-likelihood of the right answers' tokens.
    """

    kind: str
    task: str
    context: int
    held: float
    questions: int
    right: int
    right_fp32: int
    lost: int
    nll: float


@dataclass(frozen=True)
class CacheResult:
    """Everything that was found; :meth:`write` saves it as JSON.

    Attributes:
        settings: what was asked for.
        model: the model's name in tables.
        trained: positions that the model was trained to.
        factors: by context, by what YaRN stretched the model; 1 for not at all.
        text_sha256: of the text that was tokenized.
        environment: where it ran.
        perplexity_fp32: by context.
        language: every kind at every context.
        retrieval: every kind on every task at every retrieval context.
        left_out: kinds that could not be used, and why.
    """

    settings: CacheSettings
    model: str
    trained: int
    factors: dict[int, float]
    text_sha256: str
    environment: Environment
    perplexity_fp32: dict[int, float]
    language: tuple[LanguageScore, ...]
    retrieval: tuple[RetrievalScore, ...]
    left_out: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def scores(self) -> tuple[LanguageScore | RetrievalScore, ...]:
        """All of them."""
        return (*self.language, *self.retrieval)

    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds, in their order."""
        return tuple(dict.fromkeys(score.kind for score in self.scores()))

    def write(self, path: Path) -> None:
        """Write :meth:`to_dict` as JSON to ``path``, making its folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2, default=str) + "\n")


def language_score(
    kind: str,
    context: int,
    held: int,
    held_stock: int,
    found: torch.Tensor,
    stock: torch.Tensor,
    reference: torch.Tensor,
    targets: torch.Tensor,
) -> LanguageScore:
    """Compare log-probabilities, each float32 ``[P, vocabulary]``; ``targets`` int64 ``[P]``."""
    kl_stock, kl_fp32 = divergence(stock, found), divergence(reference, found)
    return LanguageScore(
        kind=kind,
        context=context,
        held=held,
        bytes=held / held_stock,
        perplexity=perplexity(found, targets),
        kl_stock=float(kl_stock.mean()),
        kl_stock_error=_standard_error(kl_stock),
        kl_fp32=float(kl_fp32.mean()),
        kl_fp32_error=_standard_error(kl_fp32),
        flips=float((found.argmax(-1) != reference.argmax(-1)).double().mean()),
    )


def retrieval_score(
    kind: str,
    task: str,
    context: int,
    held: float,
    found: Sequence[torch.Tensor],
    stock: Sequence[torch.Tensor],
    reference: Sequence[torch.Tensor],
    answers: Sequence[tuple[int, ...]],
) -> RetrievalScore:
    """Grade answers; log-probabilities float32 ``[len(answer), vocabulary]`` for every question.

    Greedy decoding gives an answer exactly when each of its tokens is the most likely one after those before it."""
    right, right_stock, right_fp32 = (
        [_exact(given, answer) for given, answer in zip(all_given, answers, strict=True)]
        for all_given in (found, stock, reference)
    )
    likelihoods = [given.gather(1, torch.tensor(answer)[:, None]) for given, answer in zip(found, answers, strict=True)]
    return RetrievalScore(
        kind=kind,
        task=task,
        context=context,
        held=held,
        questions=len(answers),
        right=sum(right),
        right_fp32=sum(right_fp32),
        lost=sum(theirs and not ours for theirs, ours in zip(right_stock, right, strict=True)),
        nll=-float(torch.cat(likelihoods).mean()),
    )


def divergence(reference: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL(reference || found), float64 ``[P]``, of log-probabilities ``[P, vocabulary]``."""
    exact = reference.double()
    return (exact.exp() * (exact - found.double())).sum(-1)


def perplexity(found: torch.Tensor, targets: torch.Tensor) -> float:
    """Of ``targets`` int64 ``[P]`` under log-probabilities ``[P, vocabulary]``."""
    return math.exp(-float(found.gather(1, targets[:, None]).double().mean()))


def _exact(given: torch.Tensor, answer: Sequence[int]) -> bool:
    return bool((given.argmax(-1) == torch.tensor(answer)).all())


def _standard_error(samples: torch.Tensor) -> float:
    return float(samples.std() / math.sqrt(len(samples))) if len(samples) > 1 else 0.0
