"""Each class in a process of its own, with limits on time and memory; a result file is all that comes back."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from zoo_classes import ZooClass
from zoo_results import ClassResult, ResultFolder, Run, Verdict

_MODULES = ["zoo_warm", "zoo_child"]
"""Imported once, in the process that the others are forked from."""


@dataclass(frozen=True)
class Limits:
    """What one class may use: seconds of wall-clock time for each dtype, and bytes of memory."""

    seconds: float
    memory: int


@dataclass(frozen=True)
class Task:
    """What to run: a class, in which dtypes, and what is known of it already."""

    entry: ZooClass
    dtypes: tuple[str, ...]
    known: ClassResult | None = None


def tasks(classes: Sequence[ZooClass], folder: ResultFolder, dtypes: Sequence[str]) -> list[Task]:
    """What is missing."""
    found = []
    for entry in classes:
        known = folder.read(entry.name)
        done = {run.combination.dtype for run in known.runs} if known else set()
        if missing := tuple(dtype for dtype in dtypes if dtype not in done):
            found.append(Task(entry, missing, known))
    return found


def run_tasks(
    waiting: Sequence[Task], folder: ResultFolder, limits: Limits, *, jobs: int, compiled: bool
) -> Iterator[ClassResult]:
    """Run tasks, ``jobs`` at a time, and give each class's result as it comes.

    A process that dies or takes too long gets a result that says so.
    """
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_MODULES)
    waiting, running = list(reversed(waiting)), dict[int, tuple[ForkServerProcess, Task, float]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.pop()
                process = context.Process(target=_child, args=(task, folder, limits, compiled))
                process.start()
                running[process.sentinel] = (process, task, time.monotonic() + limits.seconds * len(task.dtypes))
            wait = max(0.0, min(end for *_, end in running.values()) - time.monotonic())
            multiprocessing.connection.wait(list(running), timeout=wait)
            for sentinel, (process, task, end) in list(running.items()):
                late = time.monotonic() >= end
                if process.is_alive() and not late:
                    continue
                process.kill()
                process.join()
                del running[sentinel]
                if process.exitcode != 0:
                    reason = (
                        f"not done after {limits.seconds:g} s per dtype"
                        if late
                        else f"the process ended with {process.exitcode}"
                    )
                    _lost(task, folder, reason)
                yield folder.read(task.entry.name) or _lost(task, folder, "the process left no result")
    finally:
        for process, *_ in running.values():
            process.kill()


def _child(task: Task, folder: ResultFolder, limits: Limits, compiled: bool) -> None:
    from zoo_child import check  # the parent need not import torch's compiler

    resource.setrlimit(resource.RLIMIT_DATA, (limits.memory, limits.memory))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    folder.write(_with_known(task, check(task.entry, folder.version, task.dtypes, compiled=compiled)))


def _with_known(task: Task, result: ClassResult) -> ClassResult:
    return replace(result, runs=(*task.known.runs, *result.runs)) if task.known else result


def _lost(task: Task, folder: ResultFolder, message: str) -> ClassResult:
    """A result for a process that left none."""
    from zoo_worker import combinations

    runs = tuple(Run(each, Verdict.ERROR, message) for each in combinations(task.dtypes))
    entry = task.entry
    result = _with_known(task, ClassResult(entry.name, entry.model_type, entry.group, folder.version, runs))
    folder.write(result)
    return result


def default_folder(root: Path, *, compiled: bool) -> Path:
    """Where results are kept between runs; git ignores it."""
    return root / "results" / ("zoo-compiled" if compiled else "zoo")
