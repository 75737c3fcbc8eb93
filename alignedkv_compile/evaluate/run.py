"""An evaluation from beginning to end: load, fp32 reference, every method at every context, scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from ..demo.environment import describe
from ..demo.model import LoadedModel
from ..storage import DTYPES
from .equal_bytes import at_equal_bytes
from .errors import EvaluationError
from .gates import Gate, violations
from .loading import load_model
from .methods import Aligned, Method, Stock, load_methods
from .progress import progress_bars
from .reference_pass import Reference, compute_reference
from .result import Result, Settings
from .scores import Score, score
from .teacher_forcing import run as run_pass
from .texts import read_text


def evaluate(
    settings: Settings,
    gates: Sequence[Gate],
    console: Console,
    load: Callable[[str, torch.dtype], LoadedModel] = load_model,
) -> Result:
    """Run an evaluation, with a progress bar on ``console``.

    Args:
        settings: what to evaluate.
        gates: thresholds to check.
        console: where progress goes.
        load: gives the model.

    Raises:
        EvaluationError: the model, the text or a method cannot be evaluated.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    others = load_methods(settings.compare) if settings.compare is not None else ()
    aligned = tuple(Aligned(tolerance) for tolerance in settings.tolerances)
    methods: tuple[Method, ...] = (Stock(), *aligned, *others)
    names = [method.name for method in methods]
    if len(set(names)) < len(names):
        raise EvaluationError(f"two methods have the same name: {', '.join(names)}")
    with progress_bars(console) as progress:
        task = progress.add_task("loading the model", total=1)
        loaded = load(settings.model, DTYPES[settings.dtype])
        progress.advance(task)
        needed = max(settings.contexts) + settings.positions
        if needed > loaded.max_positions:
            raise EvaluationError(
                f"{loaded.name} was made for {loaded.max_positions} tokens, and --contexts and --positions need {needed}"
            )
        text = read_text(settings.text, loaded.tokenizer, needed + 1)
        task = progress.add_task("fp32 reference", total=max(settings.contexts) + settings.positions * len(settings.contexts))
        reference = compute_reference(
            loaded.model, text.tokens, settings.contexts, settings.positions, lambda steps: progress.advance(task, steps)
        )
        scores = _score_all(progress, loaded.model, methods, reference, text.tokens, settings)
    return Result(
        settings=settings,
        model=loaded.name,
        text_sha256=text.sha256,
        environment=describe(),
        nll_reference={
            context: float(-found.gather(1, _targets(text.tokens, context, settings.positions)[:, None]).mean())
            for context, found in reference.log_probabilities.items()
        },
        scores=tuple(scores),
        equal_bytes=at_equal_bytes(scores, [method.name for method in others]),
        violations=violations(gates, scores),
    )


def _targets(tokens: torch.Tensor, context: int, positions: int) -> torch.Tensor:
    return tokens[0, context + 1 : context + positions + 1]


def _score_all(
    progress: Progress,
    model: Any,
    methods: Sequence[Method],
    reference: Reference,
    tokens: torch.Tensor,
    settings: Settings,
) -> list[Score]:
    found, layers = [], len(reference.past.layers)
    for context in settings.contexts:
        targets = _targets(tokens, context, settings.positions)
        following = tokens[:, context : context + settings.positions]
        stock: torch.Tensor | None = None
        for method in methods:
            task = progress.add_task(f"{method.name}, {context} tokens", total=layers)
            log_probabilities, reading = run_pass(
                model,
                method,
                reference.past,
                context,
                following,
                settings.probes,
                lambda steps, task=task: progress.advance(task, steps),  # type: ignore[misc]
            )
            stock = log_probabilities if stock is None else stock
            tolerance = method.tolerance if isinstance(method, Aligned) else None
            exact = reference.log_probabilities[context]
            found.append(score(method.name, context, tolerance, log_probabilities, reading, exact, stock, targets))
    return found
