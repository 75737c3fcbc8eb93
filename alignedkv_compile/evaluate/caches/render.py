"""The table of kinds of caches: one row per context and kind."""

from __future__ import annotations

from ..render import Rows
from .kinds import STOCK
from .result import CacheResult, LanguageScore, RetrievalScore
from .tasks import MULTI_KEY, NEEDLE

HEADS = (
    "cache",
    "rows",
    "bytes",
    "perplexity",
    "KL to 16 bits",
    "KL to fp32",
    "× stock's",
    "flips",
    NEEDLE,
    MULTI_KEY,
    "answer NLL",
)


def cache_table(result: CacheResult) -> Rows:
    """Everything in one table, contexts in ascending order. Cells are empty where a context was not measured."""
    settings = result.settings
    contexts = sorted({*settings.contexts, *settings.retrieval_contexts})
    rows = [_row(result, context, kind) for context in contexts for kind in result.kinds()]
    return Rows(
        f"{result.model}, {settings.dtype}, {settings.text}: ways to store the cache", HEADS, tuple(rows), _note(result)
    )


def _row(result: CacheResult, context: int, kind: str) -> tuple[str, ...]:
    language = {score.kind: score for score in result.language if score.context == context}
    tasks = {score.task: score for score in result.retrieval if score.kind == kind and score.context == context}
    held = language[kind].bytes if language else next(iter(tasks.values())).held
    return (
        kind,
        str(context),
        f"{held:.1%}",
        *(_language(language[kind], language[STOCK]) if language else ("",) * 5),
        *(_right(tasks[task]) if task in tasks else "" for task in (NEEDLE, MULTI_KEY)),
        f"{tasks[MULTI_KEY].nll:.3f}" if MULTI_KEY in tasks else "",
    )


def _language(score: LanguageScore, stock: LanguageScore) -> tuple[str, ...]:
    return (
        f"{score.perplexity:.3f}",
        "" if score.kind == STOCK else f"{score.kl_stock:.1e}",
        f"{score.kl_fp32:.2e} ± {score.kl_fp32_error:.0e}",
        f"{score.kl_fp32 / stock.kl_fp32:.2f}",
        f"{score.flips:.1%}",
    )


def _right(score: RetrievalScore) -> str:
    return f"{score.right}/{score.questions}"


def _note(result: CacheResult) -> str:
    perplexities = ", ".join(f"{value:.3f} at {context}" for context, value in result.perplexity_fp32.items())
    unsolved = [
        f"{score.task} at {score.context} ({score.right}/{score.questions})"
        for score in result.retrieval
        if score.kind == STOCK and score.right < score.questions
    ]
    stretched = [f"{context} rows by {factor:g}" for context, factor in result.factors.items() if factor > 1]
    parts = [
        "bytes: of the cache's tensors at the last position, over stock's."
        f" {result.settings.positions} positions, teacher-forced."
        " KL in nats; to 16 bits: stock in the same dtype."
        " needle, multi-key: questions answered exactly; answer NLL: of multi-key's answers, nats per token."
    ]
    if perplexities:
        parts.append(f"fp32 perplexity: {perplexities}.")
    if stretched:
        parts.append(
            f"Beyond the {result.trained} positions that the model was trained to: YaRN, without training on top"
            f" ({', '.join(stretched)}); compare caches there, not contexts."
        )
    if unsolved:
        parts.append(f"Stock 16 bits does not solve {', '.join(unsolved)}: what it fails says nothing about a cache.")
    parts += [f"Left out: {name}, {reason}." for name, reason in result.left_out.items()]
    return " ".join(parts)
