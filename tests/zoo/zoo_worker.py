"""One class: every combination of cache, dtype and tolerance, judged against stock."""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from zoo_backend import CompileGraph, ZooBackend, ZooGraph, stock
from zoo_classes import ZooClass
from zoo_decode import STEPS, Decoded, decode, decode_compiled
from zoo_models import CACHES, TinyModel, tiny_model
from zoo_results import ClassResult, Combination, Run, SiteCount, Verdict
from zoo_verdict import judge

import alignedkv_compile
from alignedkv_compile.errors import StatisticsDisabledError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCES = (0.0, 2.0)
"""The second is the default. ``min_context=0``, so that a dozen rows are not too few to skip bits."""
LONGEST_MESSAGE = 300


@dataclass(frozen=True)
class _Stock:
    """What a class does without us: its own result and the truth, or why there is none."""

    result: Decoded | None
    truth: Decoded | None
    failure: str


def check_class(
    entry: ZooClass, compile_graph: CompileGraph, version: str, dtypes: Sequence[str] = tuple(DTYPES)
) -> ClassResult:
    """Run every combination of one class; no exception of the class or of the backend leaves."""
    runs: list[Run] = []
    with torch.no_grad():
        try:
            models = {name: tiny_model(entry, DTYPES[name]) for name in dtypes}
        except Exception as error:
            message = f"cannot be built: {describe(error)}"
            runs = [Run(each, Verdict.NOT_ON_STOCK, message) for each in combinations(dtypes)]
            models = {}
        for kind in CACHES:
            for name, model in models.items():
                runs += check_combinations(model, kind, name, compile_graph)
                gc.collect()
    return ClassResult(entry.name, entry.model_type, entry.group, version, tuple(runs))


def combinations(dtypes: Sequence[str]) -> list[Combination]:
    """Every combination of the given dtypes."""
    return [each for kind in CACHES for name in dtypes for each in _of(kind, name)]


def describe(error: BaseException) -> str:
    """One line: type, message and the place it came from, without a path."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:LONGEST_MESSAGE]}{place}"


def _of(kind: str, dtype: str) -> list[Combination]:
    return [Combination(kind, dtype, tolerance) for tolerance in TOLERANCES]


def check_combinations(model: TinyModel, kind: str, dtype: str, compile_graph: CompileGraph, steps: int = STEPS) -> list[Run]:
    """Both tolerances of one cache kind and dtype, which share their graphs."""
    both = _of(kind, dtype)
    known = _run_stock(model, kind, steps, DTYPES[dtype])
    if known.result is None:
        return [Run(each, Verdict.NOT_ON_STOCK, known.failure) for each in both]
    alignedkv_compile.reset_report()
    alignedkv_compile.reset_stats()
    variants = {str(each.tolerance): _options(each.tolerance) for each in both}
    backend = ZooBackend(variants, compile_graph)

    def right(decoded: Mapping[str, Decoded]) -> bool:
        return all(judge(one, known.result, known.truth, DTYPES[dtype]).right for one in decoded.values())  # type: ignore[arg-type]

    try:
        decoded = decode_compiled(model, kind, backend, steps)
        if not right(decoded):  # taking turns mixes up what a model remembers outside of its cache: RecurrentGemma's states
            alone = [ZooBackend({name: options}, compile_graph) for name, options in variants.items()]
            apart = {name: one for each in alone for name, one in decode_compiled(model, kind, each, steps).items()}
            decoded = apart if right(apart) else decoded
    except Exception as error:
        control, _ = _control(model, kind, known, steps, DTYPES[dtype])
        verdict = Verdict.NOT_ON_STOCK if control else Verdict.ERROR
        return [Run(each, verdict, control or describe(error), **_seen(backend, each)) for each in both]  # type: ignore[arg-type]
    runs, again = [], None
    if not right(decoded):
        control, again = _control(model, kind, known, steps, DTYPES[dtype])
        if control:
            return [Run(each, Verdict.NOT_ON_STOCK, control, **_seen(backend, each)) for each in both]  # type: ignore[arg-type]
    for each in both:
        judgement = judge(decoded[str(each.tolerance)], known.result, known.truth, DTYPES[dtype], again)
        verdict = Verdict.RIGHT if judgement.right else Verdict.WRONG
        run = Run(each, verdict, "", judgement.error, judgement.where, **_seen(backend, each))  # type: ignore[arg-type]
        runs.append(replace(run, rows_in_full=_rows_in_full() if each.tolerance else None))
    return runs


def _options(tolerance: float) -> dict[str, object]:
    return {"tolerance": tolerance, "min_context": 0, "stats": tolerance > 0}


def _run_stock(model: TinyModel, kind: str, steps: int, own: torch.dtype) -> _Stock:
    try:
        result = decode(model, kind, steps)
    except Exception as error:
        return _Stock(None, None, describe(error))
    if not result.finite:
        return _Stock(None, None, "its logits are not finite")
    truth = None
    for dtype in (torch.float64, torch.float32):
        if truth is None and dtype is not own:
            with contextlib.suppress(Exception):
                truth = decode(model.to(dtype), kind, steps)
    return _Stock(result, truth, "")


def _control(model: TinyModel, kind: str, known: _Stock, steps: int, dtype: torch.dtype) -> tuple[str, Decoded | None]:
    """Why ``torch.compile(backend="eager")`` does not give stock's result either, or "" and its result."""
    assert known.result is not None
    try:
        decoded = decode_compiled(model, kind, ZooBackend({"": {}}, stock), steps)
    except Exception as error:
        return f'torch.compile(backend="eager"): {describe(error)}', None
    judgement = judge(decoded[""], known.result, known.truth, dtype)
    if not judgement.right:
        return f'torch.compile(backend="eager") differs from eager in {judgement.where}', None
    return "", decoded[""]


def _seen(backend: ZooBackend, combination: Combination) -> Mapping[str, object]:
    """What the reports of one variant say, as fields of :class:`Run`."""
    graphs: list[ZooGraph] = backend.graphs[str(combination.tolerance)]
    sites: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], str] = {}
    for graph in graphs:
        for site in graph.report.sites:
            key = (site.outcome.value, site.reason)
            sites[key] += 1
            first.setdefault(key, site.where.rsplit("/", 1)[-1])
    notes = Counter(note for graph in graphs for note in (*graph.report.notes, graph.report.fallback) if note)
    return {
        "graphs": len(graphs),
        "sites": tuple(SiteCount(*key, count, first[key]) for key, count in sorted(sites.items())),
        "unseen": tuple(sorted({layer for graph in graphs for layer in graph.layers(with_site=False)})),
        "notes": tuple(f"{note} ({count} graphs)" for note, count in sorted(notes.items())),
    }


def _rows_in_full() -> float | None:
    try:
        counted = alignedkv_compile.stats()
    except StatisticsDisabledError:
        return None
    return (counted.key_rows_full + counted.value_rows_full) / (2 * counted.rows) if counted.rows else None
