"""The generated Triton on a GPU: is it right, and how fast beside the best that torch has? One JSON, under 5 minutes.

    python benchmarks/gpu.py                 # the operator at five shapes, then a Llama-3.1-8B-shaped model at batch 1 and 8
    python benchmarks/gpu.py --quick         # two shapes of the operator, then the model
    python benchmarks/gpu.py --skip-model    # or --only-model
    python benchmarks/gpu.py --dry-run       # no GPU: every section once, tiny, on the CPU; its figures mean nothing

Runs from the checkout, with what a CUDA image of torch has and transformers, rich, typer and jinja2: nothing to install. First
all that will be measured is compiled, in parallel. Every output is compared with float64 attention (the model's logits with
eager's) before its time counts. What no time was left for is reported as not run; the JSON is written after every step.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

# CUDA graphs that are captured before the profiler first runs must survive it: CUPTI stays loaded.
os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
os.environ.setdefault("TEARDOWN_CUPTI", "0")

import torch
import typer

import source_tree  # noqa: F401  before alignedkv_compile
from alignedkv_compile.demo.console import open_console
from attention_inputs import INDEPENDENT, MODEL, parse_inputs
from gpu_decode import DESCRIPTIONS as MODEL_VARIANTS
from gpu_decode import GROUPED, Decoded, batch_entry, decode, free_memory
from gpu_model import TINY, ModelShape, build, sharpen
from gpu_operator import ALIGNED, CASES, LOSSLESS, OTHER_CASES, QUICK_CASES, STREAM, TINY_CASES, Case, Plan, measure, reason
from gpu_operator import DESCRIPTIONS as OPERATOR_VARIANTS
from gpu_report import (
    MODEL_TARGETS,
    Results,
    environment,
    exit_if_wrong,
    kernel_table,
    model_table,
    operator_entry,
    operator_table,
    print_all,
    target_table,
)
from gpu_setup import Run, open_run, warm_up
from gpu_timing import capture
from gpu_warm import Job, model_job, operator_job

BATCHES = (1, 8)
MODEL_ORDER = tuple(MODEL_VARIANTS)
CASE_SECONDS, ROW_SECONDS = 10.0, 12.0
"""What a case of the operator and a row of the model may take, when it is decided whether to start one."""
MODEL_RESERVE = 75.0
"""Seconds that the operator leaves for the model."""


def bandwidth(device: torch.device) -> dict[str, object]:
    """GB/s of a large copy, bytes read plus bytes written: what the memory gives."""
    gib = 2**30 if device.type == "cuda" else 2**20
    source = torch.empty(gib, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copied = capture(lambda first, second: second.copy_(first), [(source, target)])
    samples = sorted(copied.sample() for _ in range(9))
    return {"copy_gb_per_s": 2e-3 * gib / samples[4], "bytes": gib}


def time_operator(run: Run, results: Results, cases: Sequence[Case], plan: Plan, reserve: float) -> None:
    """The operator's section."""

    def has_time(seconds: float = CASE_SECONDS / 2) -> bool:
        return run.deadline.has(run.needs(reserve + seconds))

    for case in run.progress(cases, "operator"):
        entry: dict[str, Any] = {"case": str(case), "variants": {}}
        if not has_time(CASE_SECONDS):
            results.add("operator", {**entry, "not_run": "no time left"})
            continue
        try:
            entry = operator_entry(measure(case, run.device, plan_of(case, plan), has_time))
        except Exception as error:
            entry["not_run"] = reason(error)
            run.console.print(f"{case}: not run: {entry['not_run']}")
        results.add("operator", entry)
        free_memory()
        if "not_run" not in entry:
            tables = (operator_table(entry), kernel_table(f"{case}, kernels", entry["variants"]))
            print_all(run.console, *tables)


def time_model(run: Run, results: Results, shape: ModelShape, tokens: int) -> None:
    """The model's section: for every batch size the variants that matter most first."""
    if not run.deadline.has(run.needs(ROW_SECONDS)):
        results.put("model_not_run", "no time left")
        return
    model = build(shape, run.device)
    sharpen(model, shape, run.device)
    keys = sharpen(model, shape, run.device, measure_only=True)
    free_memory()
    decoded = {batch: dict[str, Decoded]() for batch in BATCHES}
    rows = [(batch, name) for part in (MODEL_ORDER[:3], MODEL_ORDER[3:]) for batch in BATCHES for name in part]
    for batch, name in run.progress(rows, "model"):
        if name == GROUPED and run.device.type != "cuda":
            found = Decoded(not_run="no CUDA")
        elif not run.deadline.has(run.needs(ROW_SECONDS)):
            found = Decoded(not_run="no time left")
        else:
            try:
                found = decode(name, model, shape, batch, run.device, tokens)
            except Exception as error:
                found = Decoded(not_run=reason(error))
        free_memory()
        decoded[batch][name] = found
        targets = {one: MODEL_TARGETS.get((one, shape.context)) for one in BATCHES}
        results.put("model", [batch_entry(one, shape, keys, decoded[one], targets[one]) for one in BATCHES])
    for entry in results.data["model"]:
        print_all(run.console, model_table(entry), kernel_table(f"{entry['case']}, kernels per token", entry["variants"]))


def plan_of(case: Case, plan: Plan) -> Plan:
    """Of the other shapes only what an error needs."""
    return replace(plan, variants=(ALIGNED, LOSSLESS, STREAM, "sdpa"), profiled=()) if case in OTHER_CASES else plan


def jobs_of(run: Run, cases: Sequence[Case], plan: Plan, shape: ModelShape | None) -> list[Job]:
    """Everything to compile, the model's first: they take longest."""
    models = (
        [model_job(name, batch, shape, run.device) for name in MODEL_ORDER[1:] for batch in reversed(BATCHES)] if shape else []
    )
    return [*models, *(operator_job(case, run.device, plan_of(case, plan)) for case in cases)]


def main(
    quick: Annotated[bool, typer.Option("--quick", help="The operator at b1 x 32k and b8 x 32k only.")] = False,
    skip_model: Annotated[bool, typer.Option("--skip-model", help="The operator only.")] = False,
    only_model: Annotated[bool, typer.Option("--only-model", help="The model only.")] = False,
    seconds: Annotated[float, typer.Option(help="What is not done by then is reported as not run.")] = 280.0,
    tolerance: Annotated[float, typer.Option(min=0.0, help="Of the operator's aligned read.")] = Plan.tolerance,
    repeats: Annotated[int, typer.Option(min=1, help="Samples per variant of the operator.")] = Plan.repeats,
    inputs: Annotated[
        str, typer.Option(help=f"Of the operator. {MODEL}: made up like a model's. {INDEPENDENT}: numbers.")
    ] = MODEL,
    layers: Annotated[int, typer.Option(min=1, help="Of the model.")] = ModelShape.layers,
    tokens: Annotated[int, typer.Option(min=1, help="Timed per variant of the model.")] = 32,
    warm: Annotated[bool, typer.Option(help="Compile in parallel first.")] = True,
    device: Annotated[str, typer.Option(help="cuda, or cpu: tiny sizes, to see that the program runs.")] = "cuda",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tiny sizes on the CPU, nothing compiled.")] = False,
    json_path: Annotated[Path, typer.Option("--json", help="Where the figures go.")] = Path("results/gpu.json"),
) -> None:
    """Check and time the generated Triton on this machine's GPU."""
    console = open_console()
    tiny = dry_run or device == "cpu"
    cases = () if only_model else TINY_CASES if tiny else QUICK_CASES if quick else CASES + OTHER_CASES
    shape = None if skip_model else TINY if tiny else replace(ModelShape(), layers=layers)
    plan = Plan(tolerance, repeats=repeats, inputs=parse_inputs(inputs))
    with open_run(device, dry_run, seconds, console) as run, torch.no_grad():
        head = {"environment": environment(run.device), "plan": {**asdict(plan), "seconds": seconds, "tokens": tokens}}
        described = {"operator": OPERATOR_VARIANTS, "model": MODEL_VARIANTS}
        results = Results(json_path, {**head, "descriptions": described})
        results.put("compiled", warm_up(run, jobs_of(run, cases, plan, shape)) if warm else [])
        results.put("bandwidth", bandwidth(run.device))
        console.print(f"{results.data['environment']['device']}, copy {results.data['bandwidth']['copy_gb_per_s']:.0f} GB/s")
        time_operator(run, results, cases, plan, MODEL_RESERVE if shape else 0.0)
        if shape is not None:
            try:
                time_model(run, results, shape, tokens)
            except Exception as error:
                results.put("model_not_run", reason(error))
                console.print(f"model: not run: {reason(error)}")
        cached = torch._dynamo.utils.counters["inductor"]
        results.put("graphs", {"from_cache": cached["fxgraph_cache_hit"], "compiled_here": cached["fxgraph_cache_miss"]})
        results.put("seconds", run.deadline.passed)
    print_all(console, target_table(results.data))
    console.print(f"{results.data['seconds']:.0f} s; results: {json_path}")
    exit_if_wrong(console, results.data)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
