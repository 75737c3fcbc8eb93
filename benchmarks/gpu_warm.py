"""Compile in parallel what a GPU benchmark will need: one process per job, all into the Inductor cache that the benchmark uses.

Dynamo and Inductor compile under one lock, so that threads would take turns; processes do not. What a process compiles for a
shape, the benchmark finds in the cache. A job that fails costs nothing but the time that its shape takes to compile later.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

import torch

import source_tree
from attention_inputs import Shape
from gpu_model import ModelShape, gib_needed
from gpu_operator import Case, Plan

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Job:
    """One process's work.

    Attributes:
        name: for people.
        gib: device memory that it may take.
        work: what :func:`main` is told, as JSON.
    """

    name: str
    gib: float
    work: str


def operator_job(case: Case, device: torch.device, plan: Plan) -> Job:
    """All compiled variants of a case."""
    cache = 4 * case.batch * case.context * case.shape.heads * case.shape.head_dim
    work = {"kind": "operator", "device": str(device), "case": asdict(case), "plan": asdict(plan)}
    return Job(f"operator {case}", 1.0 + 3.5 * cache / 2**30, json.dumps(work))


def model_job(variant: str, batch: int, shape: ModelShape, device: torch.device) -> Job:
    """One variant of the model."""
    work = {"kind": "model", "device": str(device), "variant": variant, "batch": batch, "shape": asdict(shape)}
    return Job(f"model b{batch}, {variant}", gib_needed(shape, batch), json.dumps(work))


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    start: float


def warm(
    jobs: Sequence[Job], seconds: float, workers: int, free_gib: float, tell: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Run the jobs, as many at once as there are workers and memory; what each took, and what went wrong.

    Args:
        jobs: largest first is best.
        seconds: after which those that run are ended and the rest are left out.
        workers: processes at once.
        free_gib: device memory for all of them together; a job that needs more runs alone.
        tell: called with a line about each job that ends.
    """
    end, waiting, running, done = time.monotonic() + seconds, list(jobs), list[_Running](), list[dict[str, Any]]()

    def finish(entry: _Running, failure: str) -> None:
        running.remove(entry)
        entry.errors.close()
        took = time.monotonic() - entry.start
        done.append({"job": entry.job.name, "seconds": round(took, 1), **({"failure": failure} if failure else {})})
        tell(f"{entry.job.name}: {took:.0f} s {failure}")

    try:
        while waiting or running:
            for entry in list(running):
                if entry.process.poll() is not None:
                    finish(entry, "" if entry.process.returncode == 0 else _last_line(entry.errors))
                elif time.monotonic() > end:
                    entry.process.kill()
                    entry.process.wait()
                    finish(entry, "ended: no time left")
            if time.monotonic() > end:
                done += [{"job": job.name, "seconds": 0.0, "failure": "not started: no time left"} for job in waiting]
                waiting.clear()
            for job in list(waiting):
                used = sum(entry.job.gib for entry in running)
                if len(running) < workers and (not running or used + job.gib <= free_gib):
                    waiting.remove(job)
                    running.append(_start(job))
            time.sleep(POLL_SECONDS)
    finally:
        for entry in running:  # only after an interrupt
            entry.process.kill()
    return done


def _start(job: Job) -> _Running:
    errors = tempfile.TemporaryFile()  # noqa: SIM115  closed when the job ends
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # processes enough without Inductor's own
    command = [sys.executable, __file__, job.work]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
    return _Running(job, process, errors, time.monotonic())


def _last_line(errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    return "failed: " + (lines[-1].strip()[:200] if lines else "no message")


@torch.no_grad()
def main(work: dict[str, Any]) -> None:
    """Do one job, in a process of its own."""
    device = torch.device(work["device"])
    if work["kind"] == "operator":
        from gpu_operator import compile_case

        case = {**work["case"], "shape": Shape(**work["case"]["shape"])}
        plan = {**work["plan"], "variants": tuple(work["plan"]["variants"]), "profiled": ()}
        compile_case(Case(**case), device, Plan(**plan))
    else:
        from gpu_decode import compile_variant

        source_tree.register_backend()
        compile_variant(work["variant"], ModelShape(**work["shape"]), work["batch"], device)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
