"""JSON of runs that never ran, by the classes that write those of real ones."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from alignedkv_compile.bench_models.result import ModelResult, SuiteResult
from alignedkv_compile.demo.document import Document
from alignedkv_compile.demo.environment import Environment
from alignedkv_compile.demo.measure import BytesRead, Comparison, Timing
from alignedkv_compile.demo.quality import Quality
from alignedkv_compile.demo.result import Result, Settings
from alignedkv_compile.demo.variants import ALIGNED, COMPILED, EAGER
from alignedkv_compile.evaluate.result import Result as EvalResult
from alignedkv_compile.evaluate.result import Settings as EvalSettings
from alignedkv_compile.evaluate.scores import Score

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from attention_report import Case, Measured

MACHINE = Environment(
    cpu="A Processor",
    capability="AVX2",
    kernels="avx2",
    flags=("avx2",),
    cores=2,
    threads=2,
    memory_gib=8.0,
    platform="Linux",
    python="3.11.7",
    packages={"torch": "2.13.0", "transformers": "5.23.0"},
)
CONTEXTS, LAYERS, STEPS = (1000, 3000), 3, 5
SLOPES = {EAGER: 0.01, COMPILED: 0.02, ALIGNED: 0.002}
"""Milliseconds that a token of context adds."""
INTERCEPTS = {EAGER: 10.0, COMPILED: 10.0, ALIGNED: 12.0}
"""Milliseconds of the rest of a token."""
WOBBLE = (0.98, 0.99, 1.0, 1.01, 1.02)
"""Single timings over their median: 2 % between the quartiles."""


class Report:
    """What the demo keeps of the backend's report."""

    found, rewritten, prefill = 6, 6, 0

    def to_dict(self) -> dict[str, int]:
        return {"found": self.found, "rewritten": self.rewritten, "declined": 0, "prefill": 0}


def _timing(name: str, context: int) -> Timing:
    median = INTERCEPTS[name] + SLOPES[name] * context
    held = tuple(100_000 + 10 * context + 50_000 * (name == ALIGNED) for _ in range(STEPS))
    return Timing(name, "static", context, 3.0, (0.1, 0.1), tuple(median * part for part in WOBBLE), held)


def demo_result() -> Result:
    """A run of the demo at two contexts."""
    comparisons = tuple(
        Comparison(
            "static",
            context,
            tuple(_timing(name, context) for name in SLOPES),
            BytesRead(
                tuple(tuple(10 * (layer + 1) + step for layer in range(LAYERS)) for step in range(STEPS)),
                tuple((100,) * LAYERS for _ in range(STEPS)),
            ),
        )
        for context in CONTEXTS
    )
    qualities = tuple(
        Quality(name, CONTEXTS[-1], 32, share, kl, 10 * kl, 0.99, 2.0, 2.0)
        for name, share, kl in ((EAGER, 1.0, 4e-4), (COMPILED, 1.0, 3e-4), (ALIGNED, 0.2, 5e-4))
    )
    document = Document(torch.zeros(1, 3100, dtype=torch.int64), ("argparse",), "0" * 64)
    return Result("tiny", document, Settings(contexts=CONTEXTS), MACHINE, comparisons, qualities, (), Report())


def _score(method: str, tolerance: float | None, share: float, error: float) -> Score:
    return Score(
        method=method,
        context=512,
        positions=32,
        tolerance=tolerance,
        bytes=share,
        nll=2.0,
        perplexity=7.4,
        delta_nll=0.001,
        delta_nll_error=0.001,
        delta_stock=0.001,
        delta_stock_error=0.001,
        kl_mean=error,
        kl_error=error / 10,
        kl_p99=10 * error,
        flips=0.01,
        attention_error=error,
        attention_p99=3 * error,
        layer_errors=(error,) * LAYERS,
        added_rms=None if tolerance is None else tolerance / 2,
        added_median=None if tolerance is None else tolerance / 3,
        added_p99=tolerance,
        added_worst=tolerance,
    )


def _eval() -> dict[str, Any]:
    scores = (_score("stock", None, 1.0, 1e-3), _score("alignedkv 1", 1.0, 0.4, 1e-3), _score("alignedkv 2", 2.0, 0.3, 2e-3))
    settings = EvalSettings(contexts=(512,), positions=32, tolerances=(1.0, 2.0))
    found = EvalResult(settings, "tiny", "0" * 64, MACHINE, {512: 2.0}, scores, (), ())
    return found.to_dict()


def _caches() -> dict[str, Any]:
    """The entries of `alignedkv eval-caches` that are read here."""
    kinds = (("stock", 1.0, 1e-4, 10), ("8bit", 0.55, 2e-4, 9))
    return {
        "settings": {"model": "tiny", "contexts": [512]},
        "model": "tiny",
        "text_sha256": "0" * 64,
        "environment": asdict(MACHINE),
        "language": [
            {
                "kind": kind,
                "context": 512,
                "held": int(1e6 * share),
                "bytes": share,
                "perplexity": 7.4,
                "kl_fp32": kl,
                "flips": 0.01,
            }
            for kind, share, kl, _ in kinds
        ],
        "retrieval": [
            {"kind": kind, "task": "needle", "context": 512, "questions": 10, "right": right} for kind, _, _, right in kinds
        ],
        "left_out": {"HF hqq 8-bit": "hqq is not installed"},
    }


def _attention() -> dict[str, Any]:
    def measured(median: float, share: float) -> Measured:
        return Measured(median, median, tuple(median * part for part in WOBBLE), 1e-3, 1e4, share, 10.0, 1.0, 10.0)

    cases = [
        Case(
            "8/2/64",
            context,
            "bfloat16",
            128.0,
            4,
            "",
            2048,
            0.4,
            {
                "aligned": measured(0.1 + 1e-5 * context, 0.3),
                "stream": measured(0.05 + 2e-5 * context, 1.0),
                "default": measured(0.05 + 2e-5 * context, 1.0),
                "sdpa packed": measured(0.1 + 1e-4 * context, 1.0),
            },
        )
        for context in (1024, 16384)
    ]
    cases.append(Case("8/2/64", 65536, "bfloat16", skipped="needs about 99 GiB of memory"))
    plan = {"rounds": 5, "tolerance": 2.0, "inputs": "synthetic"}
    return {"environment": asdict(MACHINE), "plan": plan, "descriptions": {}, "cases": [asdict(case) for case in cases]}


def _peers() -> dict[str, Any]:
    """The benchmark's cases with a peer that lacks a context, and one that refuses."""
    data = _attention()
    for case in data["cases"]:
        case["copies"], case["refused"] = {}, {"openvino u8": "openvino is not installed"} if case["variants"] else {}
    del data["cases"][0]["variants"]["sdpa packed"]
    settings = {"dtype": "bfloat16", "rounds": 5, "tolerance": 2.0}
    names = ("aligned", "stream", "sdpa packed", "openvino u8")
    return {"environment": data["environment"], "settings": settings, "peers": dict.fromkeys(names, ""), "cases": data["cases"]}


def _models() -> dict[str, Any]:
    entries = (ModelResult("first", demo_result()), ModelResult("second", None, "it is too short"))
    return SuiteResult(Settings(contexts=CONTEXTS), "bfloat16", MACHINE, entries).to_dict()


def sample(kind: str) -> dict[str, Any]:
    """What the JSON of a run holds; ``kind`` is one of :data:`KINDS`."""
    makers = {
        "demo": lambda: demo_result().to_dict(),
        "eval": _eval,
        "caches": _caches,
        "attention": _attention,
        "peers": _peers,
        "models": _models,
    }
    found: dict[str, Any] = json.loads(json.dumps(makers[kind](), default=str))
    return found


KINDS = ("demo", "eval", "caches", "attention", "peers", "models")


def write(data: dict[str, Any], path: Path) -> Path:
    """Save a run."""
    path.write_text(json.dumps(data))
    return path


def scaled(data: dict[str, Any], variant: str, entry: str, factor: float) -> dict[str, Any]:
    """A demo's JSON in which a timing's entry (a list) is ``factor`` times what it was."""
    found = copy.deepcopy(data)
    for comparison in found["comparisons"]:
        for timing in comparison["timings"]:
            if timing["variant"] == variant:
                timing[entry] = [factor * value for value in timing[entry]]
    return found


def on(data: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The same run on another machine."""
    return data | {"environment": asdict(replace(MACHINE, **changes))}
