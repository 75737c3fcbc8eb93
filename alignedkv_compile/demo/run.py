"""The demo from beginning to end: load, prefill, time, check, report."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .. import report
from ..break_even import ReadShape
from ..cost import priced
from ..options import parse
from . import render
from .document import Document, long_document
from .environment import describe
from .measure import Comparison, calls_per_comparison, compare
from .model import DemoUnavailableError, LoadedModel, load_smollm2
from .prefill import Past, prefill
from .quality import Continuation, Quality, first_difference, greedy, teacher_forced
from .result import STATIC, Result, Settings
from .variants import Variant, stock_and_aligned, warm_up_compiler

RECOMPILE_LIMIT = 32
"""Dynamo's default of 8 counts the graphs of all variants together."""


def run(settings: Settings, console: Console, load: Callable[[], LoadedModel] = load_smollm2) -> Result:
    """Run the demo and print its tables on ``console``; arguments and errors are those of :func:`measure`."""
    _require_compiler()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    render.print_environment(describe(), console)
    result, max_positions = measure(settings, console, load)
    render.print_result(result, console)
    if max(settings.contexts) + settings.positions > max_positions:
        console.print(f"[yellow]Positions beyond {max_positions} are outside of what {result.model} was made for.[/]")
    return result


def measure(settings: Settings, console: Console, load: Callable[[], LoadedModel]) -> tuple[Result, int]:
    """Measure one model.

    Args:
        settings: what to run.
        console: where progress goes.
        load: gives the model.

    Returns:
        The result, and the longest context that the model was made for.

    Raises:
        DemoUnavailableError: weights, packages or a C++ compiler are missing, or the document is too short.
    """
    _require_compiler()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    environment = describe()
    with _progress(console) as progress:
        loaded = _step(progress, "loading the model", load)
        document = long_document(loaded.tokenizer, max(settings.contexts) + settings.following())
        past, reference = _prefill(progress, loaded, document, settings)
        _step(progress, "starting the C++ compiler", warm_up_compiler)
        options = {"tolerance": settings.tolerance, "min_context": settings.min_context, "stats": True}
        _step(progress, "timing reads, once per machine", lambda: _time_reads(past, options))
        recompiling = torch.compiler.config.patch(recompile_limit=RECOMPILE_LIMIT)  # type: ignore[attr-defined]
        with recompiling, stock_and_aligned(loaded.model, options) as variants:
            comparisons = tuple(_compare_all(progress, variants, past, document, settings))
            qualities, continuations = _check(progress, variants, loaded, past, document, reference, settings)
            found = report()
    result = Result(loaded.name, document, settings, environment, comparisons, qualities, continuations, found)
    return result, loaded.max_positions


def _compare_all(
    progress: Progress, variants: Sequence[Variant], past: Past, document: Document, settings: Settings
) -> list[Comparison]:
    """Static caches first: by the time of the DynamicCache, Dynamo knows that the length varies, for every variant alike."""
    found = []
    for kind in settings.caches:
        for context in settings.contexts:
            task = progress.add_task(
                f"decoding, {kind} cache, {context} tokens", total=len(variants) * calls_per_comparison(settings.tokens)
            )

            def make_cache(kind: str = kind, context: int = context) -> Any:
                if kind == STATIC:
                    return past.static_cache(context, settings.capacity(context))
                return past.dynamic_cache(context)

            following = document.tokens[:, context : context + settings.following()]
            found.append(
                compare(variants, make_cache, kind, context, following, settings.tokens, _advance(progress, task)),
            )
    return found


def _check(
    progress: Progress,
    variants: Sequence[Variant],
    loaded: LoadedModel,
    past: Past,
    document: Document,
    reference: torch.Tensor,
    settings: Settings,
) -> tuple[tuple[Quality, ...], tuple[Continuation, ...]]:
    """Accuracy and greedy text of every variant at the longest context, with a StaticCache."""
    context = max(settings.contexts)
    capacity = settings.capacity(context)
    following = document.tokens[:, context:]
    task = progress.add_task("accuracy against fp32", total=len(variants) * settings.positions)
    qualities = tuple(
        teacher_forced(variant, past.static_cache(context, capacity), context, following, reference, _advance(progress, task))
        for variant in variants
    )
    task = progress.add_task("greedy text", total=len(variants) * settings.continuation)
    texts = [
        greedy(
            variant,
            past.static_cache(context, capacity),
            following[:, :1],
            settings.continuation,
            _advance(progress, task),
        )
        for variant in variants
    ]
    continuations = tuple(
        Continuation(variant.name, context, tuple(ids), loaded.tokenizer.decode(ids), first_difference(texts[0], ids))
        for variant, ids in zip(variants, texts, strict=True)
    )
    return qualities, continuations


def _time_reads(past: Past, options: Mapping[str, object]) -> None:
    """Measure what the backend would measure while it compiles, so that it is in nobody's time to first token."""
    chosen = priced(parse(None, options))
    query_heads = getattr(past.config.get_text_config(), "num_attention_heads", 0)  # 0: the backend measures when it compiles
    for key, value in past.layers:
        batch, heads, _, dim = key.shape
        if group := query_heads // heads:
            chosen.least_context(ReadShape(key.device, key.dtype, batch * heads, group, dim, value.shape[3]))


def _prefill(progress: Progress, loaded: LoadedModel, document: Document, settings: Settings) -> tuple[Past, torch.Tensor]:
    tokens = document.tokens[:, : max(settings.contexts) + settings.positions]
    task = progress.add_task("prefill in fp32", total=tokens.shape[1])
    return prefill(loaded.model, tokens, settings.positions, _advance(progress, task))


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def _advance(progress: Progress, task: Any) -> Callable[[int], None]:
    return lambda steps: progress.advance(task, steps)


def _step(progress: Progress, description: str, action: Callable[[], Any]) -> Any:
    """Run ``action`` under a progress line of one step."""
    task = progress.add_task(description, total=1)
    value = action()
    progress.advance(task)
    return value


def _require_compiler() -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise DemoUnavailableError(
            f"torch.compile needs a C++ compiler and {compiler!r} is not found: install g++, or set the variable CXX"
        )
