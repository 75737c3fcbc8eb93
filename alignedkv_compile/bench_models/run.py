"""Measure one model after the other; one that cannot be measured does not keep the others from it."""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.markup import escape

from .. import reset_report
from ..demo.environment import describe
from ..demo.model import LoadedModel
from ..demo.result import Result, Settings
from ..demo.run import measure
from ..errors import AlignedKVError
from ..evaluate.errors import EvaluationError
from ..evaluate.loading import load_model
from .result import ModelResult, SuiteResult

_log = logging.getLogger(__name__)


def run_suite(
    sources: Sequence[str],
    settings: Settings,
    dtype: torch.dtype,
    console: Console,
    done: Callable[[SuiteResult], None] = lambda _: None,
) -> SuiteResult:
    """Run the demo's measurements over several models.

    Args:
        sources: what :func:`alignedkv_compile.evaluate.loading.load_model` takes.
        settings: what to run, the same for every model.
        dtype: of the models and their caches.
        console: where progress goes.
        done: called with what there is so far after each model.
    """
    found: list[ModelResult] = []
    for source in sources:
        console.print(f"[bold]{escape(source)}[/]", highlight=False)
        entry = _one(source, settings, dtype, console)
        found.append(entry)
        suite = SuiteResult(settings, str(dtype).removeprefix("torch."), describe(), tuple(found))
        done(suite)
    return suite


def _one(source: str, settings: Settings, dtype: torch.dtype, console: Console) -> ModelResult:
    torch.compiler.reset()  # the graphs of the model before count towards Dynamo's limit
    reset_report()
    try:
        return ModelResult(source, _measure(source, settings, dtype, console))
    except AlignedKVError as error:
        return ModelResult(source, None, str(error))
    except Exception as error:  # whatever a model that nobody has tried here raises
        _log.info("%s", source, exc_info=True)
        return ModelResult(source, None, f"{type(error).__name__}: {error}")
    finally:
        gc.collect()  # its weights, before the next model's


def _measure(source: str, settings: Settings, dtype: torch.dtype, console: Console) -> Result:
    result, _ = measure(settings, console, functools.partial(_load, source, settings, dtype))
    return result


def _load(source: str, settings: Settings, dtype: torch.dtype) -> LoadedModel:
    loaded = load_model(source, dtype)
    needed = max(settings.contexts) + settings.following()
    if needed > loaded.max_positions:
        raise EvaluationError(
            f"{loaded.name} was made for {loaded.max_positions} tokens, and --contexts, --tokens and --positions need {needed}"
        )
    return loaded
