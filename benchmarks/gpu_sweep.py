"""From which context on does the aligned read pay? Every number of (batch, KV head) pairs by every context, against the stream.

    python benchmarks/gpu_sweep.py                 # pairs 8 to 256, contexts 2k to 128k: about four minutes
    python benchmarks/gpu_sweep.py --pairs 8,64 --contexts 8192,32768

Prints and writes the *break-even contexts*: the shortest measured context from which on the aligned read is faster, there and
at every longer one; null where it never is. The aligned read is measured with ``min_context=1``, so that nothing sends it to
the stream but its own count of bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import source_tree  # noqa: F401  before alignedkv_compile
from alignedkv_compile.demo.console import open_console
from attention_inputs import INDEPENDENT, MODEL, parse_inputs
from gpu_operator import ALIGNED, CUDNN, FLASH, LLAMA, STREAM, Case, Plan, measure
from gpu_report import Results, environment, exit_if_wrong, operator_entry, operator_table, print_all
from gpu_setup import Run, open_run, warm_up
from gpu_warm import operator_job

PAIRS = (8, 32, 64, 256)
CONTEXTS = tuple(2048 << step for step in range(7))
STOCK = "sdpa"
"""The faster of cuDNN's kernel and FlashAttention."""
VARIANTS = (ALIGNED, STREAM, CUDNN, FLASH)
CELL_SECONDS = 6.0


def cells_of(pairs: Iterable[int], contexts: Iterable[int]) -> list[Case]:
    """One case per cell; ``pairs`` are multiples of the KV heads."""
    return [Case(number // LLAMA.heads, context) for number in sorted(pairs) for context in sorted(contexts)]


def microseconds(entry: Mapping[str, Any], rival: str) -> float | None:
    """Median of a variant in a cell, or of :data:`STOCK`; None when it was not run or is wrong."""
    names = (CUDNN, FLASH) if rival == STOCK else (rival,)
    found = [entry["variants"].get(name, {}) for name in names]
    return min((one["median_us"] for one in found if "median_us" in one and not one["wrong"]), default=None)


def break_even(entries: Sequence[Mapping[str, Any]], rival: str) -> dict[str, int | None]:
    """Pairs to break-even context against ``rival``. A cell without both times counts as lost: nothing is promised there."""
    found: dict[str, int | None] = {}
    for pairs in sorted({entry["pairs"] for entry in entries}):
        found[str(pairs)] = None
        row = [entry for entry in entries if entry["pairs"] == pairs]
        for entry in sorted(row, key=lambda one: -one["context"]):
            ours, theirs = microseconds(entry, ALIGNED), microseconds(entry, rival)
            if ours is None or theirs is None or ours >= theirs:
                break
            found[str(pairs)] = entry["context"]
    return found


def sweep(run: Run, results: Results, cells: Sequence[Case], plan: Plan) -> None:
    """Measure the cells, and write the table after each."""
    entries: list[dict[str, Any]] = []
    for case in run.progress(cells, "sweep"):
        about = {"case": str(case), "pairs": case.batch * case.shape.heads, "context": case.context}
        try:
            if not run.deadline.has(run.needs(CELL_SECONDS)):
                raise TimeoutError("no time left")
            entry = {**operator_entry(measure(case, run.device, plan, lambda: True)), **about}
        except Exception as error:
            entry = {**about, "not_run": f"{type(error).__name__}: {error}"[:200], "variants": {}}
        entries.append(entry)
        results.add("sweep", entry)
        results.put("break_even", {rival: break_even(entries, rival) for rival in (STREAM, STOCK)})
        if "not_run" not in entry:
            print_all(run.console, operator_table(entry))


def main(
    pairs: Annotated[str, typer.Option(help="(batch, KV head) pairs, multiples of 8.")] = ",".join(map(str, PAIRS)),
    contexts: Annotated[str, typer.Option(help="Cache rows.")] = ",".join(map(str, CONTEXTS)),
    tolerance: Annotated[float, typer.Option(min=0.0, help="Of the aligned read.")] = Plan.tolerance,
    repeats: Annotated[int, typer.Option(min=1, help="Samples per variant.")] = 9,
    inputs: Annotated[str, typer.Option(help=f"{MODEL}: made up like a model's. {INDEPENDENT}: numbers.")] = MODEL,
    seconds: Annotated[float, typer.Option(help="What is not done by then is reported as not run.")] = 280.0,
    device: Annotated[str, typer.Option(help="cuda, or cpu to see that the program runs.")] = "cuda",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="On the CPU, nothing compiled.")] = False,
    json_path: Annotated[Path, typer.Option("--json", help="Where the figures go.")] = Path("results/gpu-sweep.json"),
) -> None:
    """Measure the aligned read against the stream over pairs and contexts."""
    console = open_console()
    cells = cells_of((int(part) for part in pairs.split(",")), (int(part) for part in contexts.split(",")))
    plan = Plan(tolerance, min_context=1, repeats=repeats, variants=VARIANTS, profiled=(), inputs=parse_inputs(inputs))
    with open_run(device, dry_run, seconds, console) as run, torch.no_grad():
        results = Results(json_path, {"environment": environment(run.device), "plan": vars(plan)})
        largest_first = sorted(cells, key=lambda case: -case.batch * case.context)
        results.put("compiled", warm_up(run, [operator_job(case, run.device, plan) for case in largest_first]))
        sweep(run, results, cells, plan)
    console.print_json(json.dumps(results.data["break_even"]))
    console.print(f"results: {json_path}")
    exit_if_wrong(console, results.data)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
