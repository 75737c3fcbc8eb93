"""What the GPU programs do before they measure: find the device, open caches of their own, compile in parallel."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.progress import track

import source_tree
from gpu_report import Deadline
from gpu_warm import Job, warm

T = TypeVar("T")

WARM_SHARE = 0.4
"""Of a run's seconds that compiling in parallel may take."""
MEMORY_SHARE = 0.85
"""Of the device's free memory that processes which compile may take together."""


@dataclass(frozen=True)
class Run:
    """One run of a program.

    Attributes:
        device: what is measured; a CPU only shows that the program runs.
        compiles: False when nothing is compiled, to see it run in seconds.
        deadline: when it must be done.
        console: where it prints.
    """

    device: torch.device
    compiles: bool
    deadline: Deadline
    console: Console

    def needs(self, seconds: float) -> float:
        """Seconds to have before a step that takes about ``seconds`` on a GPU; on a CPU a step is started at any time."""
        return seconds if self.device.type == "cuda" else 0.0

    def progress(self, items: Sequence[T], what: str) -> Iterable[T]:
        """A bar on a terminal, nothing in a log."""
        return track(items, what, console=self.console, disable=not self.console.is_terminal)


@contextlib.contextmanager
def open_run(device: str, dry_run: bool, seconds: float, console: Console) -> Iterator[Run]:
    """The device, and Inductor's and Triton's caches in an empty folder: templates are not part of Inductor's own key.

    Raises:
        typer.Exit: a GPU was asked for, and there is none.
    """
    kind = "cpu" if dry_run else device
    if kind == "cuda" and not torch.cuda.is_available():
        Console(stderr=True).print(
            "[red]error:[/] this benchmark needs a CUDA or ROCm GPU, and torch finds none"
            f" (torch {torch.__version__}, built for CUDA {torch.version.cuda}, ROCm {torch.version.hip}).\n"
            "Without one, --dry-run shows that the program runs, `make gpu-codegen` compiles the kernels, and"
            " benchmarks/sectors.py counts what they load.",
            highlight=False,
        )
        raise typer.Exit(1)
    found = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    source_tree.register_backend()
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.pop(name, None) for name in names}
    with tempfile.TemporaryDirectory(prefix="alignedkv-bench-", ignore_cleanup_errors=True) as folder:
        os.environ[names[0]] = folder  # Triton's follows it
        torch.compiler.set_stance("force_eager" if dry_run else "default")
        try:
            yield Run(found, not dry_run, Deadline(seconds), console)
        finally:
            torch.compiler.set_stance("default")
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def warm_up(run: Run, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Compile in parallel; see :func:`gpu_warm.warm`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not run.compiles or cores < 4:
        return [{"job": job.name, "seconds": 0.0, "failure": "left to the benchmark"} for job in jobs]
    free = torch.cuda.mem_get_info(run.device)[0] / 2**30 if run.device.type == "cuda" else 8.0
    run.console.print(f"compiling {len(jobs)} jobs in parallel on {cores} cores")
    done = warm(jobs, WARM_SHARE * run.deadline.seconds, cores, MEMORY_SHARE * free, run.console.print)
    for choice in Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).rglob("*.best_config"):
        choice.unlink()  # Inductor's choice of a launch, measured while other processes used the device
    return done
