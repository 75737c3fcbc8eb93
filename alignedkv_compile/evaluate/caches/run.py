"""An evaluation of kinds of caches from beginning to end: load, read every text once, run every kind after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import Progress

from ...demo.environment import describe
from ...demo.model import LoadedModel
from ...storage import DTYPES
from ..errors import EvaluationError
from ..loading import load_model
from ..progress import progress_bars
from ..texts import read_text
from .continuing import Continued, run_after
from .kinds import KINDS, CacheKind, choose
from .prefilled import Continuation, Reader
from .result import (
    CacheResult,
    CacheSettings,
    LanguageScore,
    RetrievalScore,
    language_score,
    perplexity,
    retrieval_score,
)
from .rope import stretch_factor, stretched
from .tasks import Haystack, haystacks


@dataclass(frozen=True)
class _Bench:
    """What every measurement needs."""

    loaded: LoadedModel
    reader: Reader
    kinds: tuple[CacheKind, ...]
    progress: Progress

    @contextmanager
    def stretched_to(self, rows: int) -> Iterator[None]:
        """Both models have room for ``rows`` positions."""
        factor = stretch_factor(rows, self.loaded.max_positions)
        with stretched(self.loaded.model, factor), stretched(self.reader.model, factor):
            yield

    def run(self, name: str, tokens: Sequence[int], following: Sequence[Continuation]) -> tuple[_Run, ...]:
        """Read ``tokens`` and run every kind after it, stock first."""
        task = self.progress.add_task(f"{name}: reading", total=len(tokens))
        prefilled = self.reader.read(tokens, following, lambda count: self.progress.advance(task, count))
        found = []
        for kind in self.kinds:
            task = self.progress.add_task(f"{name}: {kind.name}", total=len(following))
            continued = run_after(
                self.loaded.model,
                kind,
                prefilled,
                following,
                lambda count, task=task: self.progress.advance(task, count),  # type: ignore[misc]
            )
            found.append(_Run(kind.name, continued, prefilled.references))
        return tuple(found)


@dataclass(frozen=True)
class _Run:
    kind: str
    continued: Continued
    references: tuple[torch.Tensor, ...]


def evaluate_caches(
    settings: CacheSettings, console: Console, load: Callable[[str, torch.dtype], LoadedModel] = load_model
) -> CacheResult:
    """Run an evaluation, with a progress bar on ``console``.

    Args:
        settings: what to evaluate.
        console: where progress goes.
        load: gives the model.

    Raises:
        EvaluationError: the model, the text, a kind of cache or a context cannot be evaluated.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    kinds = choose(settings.kinds, settings.slow_kinds)
    short = [context for context in settings.contexts if context <= settings.positions]
    if short:
        raise EvaluationError(f"a context of {short[0]} rows has no room for {settings.positions} positions and a text before")
    with progress_bars(console) as progress:
        task = progress.add_task("loading the model", total=1)
        loaded = load(settings.model, DTYPES[settings.dtype])
        _require_full_attention(loaded)
        bench = _Bench(loaded, Reader(loaded.model, settings.keep), kinds, progress)
        progress.advance(task)
        longest = max(settings.contexts, default=0)
        text = read_text(settings.text, loaded.tokenizer, longest + 1)
        ids = text.tokens[0].tolist()
        language, perplexities = list[LanguageScore](), dict[int, float]()
        for context in settings.contexts:
            scores, perplexities[context] = _language(bench, ids, context, settings.positions)
            language += scores
        retrieval = list[RetrievalScore]()
        for context in settings.retrieval_contexts:
            retrieval += _retrieval(bench, context, settings.depths)
    rows = sorted({*settings.contexts, *settings.retrieval_contexts})
    return CacheResult(
        settings=settings,
        model=loaded.name,
        trained=loaded.max_positions,
        factors={context: stretch_factor(context, loaded.max_positions) for context in rows},
        text_sha256=text.sha256,
        environment=describe(),
        perplexity_fp32=perplexities,
        language=tuple(language),
        retrieval=tuple(retrieval),
        left_out={kind.name: kind.missing for kind in KINDS if kind.missing} if settings.kinds is None else {},
    )


def _require_full_attention(loaded: LoadedModel) -> None:
    config = loaded.model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        raise EvaluationError(
            f"{loaded.name} has layers of {', '.join(sorted(kinds))}; only caches of layers that attend to the whole past are"
            " compared"
        )


def _language(bench: _Bench, ids: Sequence[int], context: int, positions: int) -> tuple[list[LanguageScore], float]:
    start = context - positions
    targets = tuple(ids[start + 1 : context + 1])
    following = [Continuation(tuple(ids[start:context]), targets)]
    with bench.stretched_to(context):
        runs = bench.run(f"{context} rows", ids[:start], following)
    stock, right = runs[0], torch.tensor(targets)
    scores = [
        language_score(
            run.kind,
            context,
            run.continued.held,
            stock.continued.held,
            run.continued.log_probabilities[0],
            stock.continued.log_probabilities[0],
            run.references[0],
            right,
        )
        for run in runs
    ]
    return scores, perplexity(stock.references[0], right)


def _retrieval(bench: _Bench, context: int, depths: Sequence[float]) -> list[RetrievalScore]:
    """One score per kind and task: the needles of all depths count together."""
    by_task = dict[str, list[tuple[Haystack, tuple[_Run, ...]]]]()
    with bench.stretched_to(context):
        for haystack in haystacks(bench.loaded.tokenizer, context, depths):
            following = [
                Continuation(question.prompt + question.answer[:-1], question.answer) for question in haystack.questions
            ]
            runs = bench.run(f"{haystack.task}, {context} rows", haystack.tokens, following)
            by_task.setdefault(haystack.task, []).append((haystack, runs))
    return [_grade(task, context, done, index) for task, done in by_task.items() for index in range(len(bench.kinds))]


def _grade(task: str, context: int, done: Sequence[tuple[Haystack, tuple[_Run, ...]]], index: int) -> RetrievalScore:
    chosen, stock = ([runs[place] for _, runs in done] for place in (index, 0))
    return retrieval_score(
        chosen[0].kind,
        task,
        context,
        sum(run.continued.held for run in chosen) / sum(run.continued.held for run in stock),
        [given for run in chosen for given in run.continued.log_probabilities],
        [given for run in stock for given in run.continued.log_probabilities],
        [given for run in chosen for given in run.references],
        [question.answer for haystack, _ in done for question in haystack.questions],
    )
