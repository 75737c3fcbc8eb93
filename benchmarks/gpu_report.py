"""What the GPU benchmark writes: one JSON file, rewritten after every step, and tables; what each figure should be."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from gpu_operator import ALIGNED, CUDNN, FLOOR, LLAMA, SDPA, STREAM, Measured, Outcome

OPERATOR_TARGETS: Mapping[tuple[int, int], float] = {
    (8, 32768): 0.5,
    (1, 131072): 0.55,
    (1, 32768): 0.85,
    (1, 8192): 1.05,
    (1, 4096): 1.05,
}
"""Batch and context of 32/8/128 heads to what the aligned read may take of cuDNN's time. The last two should be streamed."""
STREAM_TARGET = 1.1
"""The same for the stream, everywhere."""
MODEL_TARGETS: Mapping[tuple[int, int], float] = {(1, 32768): 2.0, (8, 32768): 4.0}
"""Batch and context to how many times faster than ``torch.compile`` a token of the model should be."""
KERNELS_KEPT = 24
"""Of each variant, in the JSON."""


class Deadline:
    """Seconds that a run may take."""

    def __init__(self, seconds: float) -> None:
        self._start, self.seconds = time.monotonic(), seconds

    @property
    def passed(self) -> float:
        return time.monotonic() - self._start

    def has(self, seconds: float) -> bool:
        """Whether so many are left."""
        return self.passed + seconds <= self.seconds


class Results:
    """Everything found so far; on disk after every :meth:`add`, so that a run that is stopped leaves what it had.

    Args:
        path: of the JSON file.
        head: what stands before the sections.
    """

    def __init__(self, path: Path, head: Mapping[str, object]) -> None:
        self.path, self.data = path, dict[str, Any](head)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def put(self, section: str, entry: object) -> None:
        """Set a section."""
        self.data[section] = entry
        self._write()

    def add(self, section: str, entry: object) -> None:
        """Append to a section."""
        self.data.setdefault(section, []).append(entry)
        self._write()

    def _write(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        partial.replace(self.path)


def operator_entry(outcome: Outcome) -> dict[str, Any]:
    """One case as JSON, with ratios and targets."""
    medians = {
        name: found.times.median for name, found in outcome.variants.items() if found.times is not None and not found.wrong
    }
    fastest = min((medians[name] for name in SDPA if name in medians), default=None)
    entries = dict[str, Any]()
    for name, found in outcome.variants.items():
        median = medians.get(name)
        share = outcome.bytes_share if name == ALIGNED else 1.0
        entry: dict[str, Any] = {
            **({"not_run": found.not_run} if found.not_run else {}),
            **_times(found),
            "error": found.error,
            "mean_error": found.mean_error,
            "wrong": found.wrong,
            "gb_per_s": _ratio(1e-3 * outcome.cache_bytes * share, median) if share else None,
            "over_cudnn": _ratio(median, medians.get(CUDNN)),
            "over_fastest_sdpa": _ratio(median, fastest),
            "over_floor": _ratio(median, medians.get(FLOOR)),
            "kernels": [asdict(kernel) for kernel in found.kernels[:KERNELS_KEPT]],
        }
        target = operator_target(outcome, name)
        if target is not None:
            entry |= {"target_over_cudnn": target, "met": entry["over_cudnn"] is not None and entry["over_cudnn"] <= target}
        entries[name] = entry
    case = outcome.case
    return {
        "case": str(case),
        "batch": case.batch,
        "context": case.context,
        "heads": str(case.shape),
        "dtype": case.dtype,
        "copies": outcome.copies,
        "cache_bytes": outcome.cache_bytes,
        "bytes_share": outcome.bytes_share,
        **({"bytes_not_counted": outcome.not_counted} if outcome.not_counted else {}),
        "variants": entries,
    }


def operator_target(outcome: Outcome, variant: str) -> float | None:
    """What share of cuDNN's time the variant may take, where something was promised."""
    if (outcome.case.shape, outcome.case.dtype) != (LLAMA, "bfloat16"):
        return None
    if variant == STREAM:
        return STREAM_TARGET
    return OPERATOR_TARGETS.get((outcome.case.batch, outcome.case.context)) if variant == ALIGNED else None


def _times(found: Measured) -> dict[str, float]:
    if found.times is None:
        return {}
    return {"median_us": found.times.median, "min_us": found.times.least, "max_us": found.times.most}


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over is not None and under else None


def operator_table(entry: Mapping[str, Any]) -> Table:
    """One case."""
    read = "" if entry["bytes_share"] is None else f", aligned reads {entry['bytes_share']:.1%} of the bytes"
    title = f"{entry['case']}: {entry['copies']} copies{read}"
    columns = ("variant", "us", "min", "max", "/ cuDNN", "target", "/ best SDPA", "/ floor", "GB/s", "error, u")
    table = _table(title, columns, entry["variants"])
    for name, found in entry["variants"].items():
        if "median_us" not in found:
            continue
        target = f"<= {found['target_over_cudnn']:g} {_met(found['met'])}" if "target_over_cudnn" in found else ""
        error = _number(found["error"]) + (" WRONG" if found["wrong"] else "")
        times = (_number(found[key]) for key in ("median_us", "min_us", "max_us"))
        ratios = (_number(found[key]) for key in ("over_fastest_sdpa", "over_floor"))
        table.add_row(name, *times, _number(found["over_cudnn"]), target, *ratios, _number(found["gb_per_s"]), error)
    return table


def kernel_table(title: str, variants: Mapping[str, Any], most: int = 8) -> Table:
    """The slowest kernels of each variant, as the profiler names them."""
    table = _table(title, ("variant", "kernel", "us per call", "launches"), {})
    for name, found in variants.items():
        for kernel in found.get("kernels", [])[:most]:
            row = (kernel["name"].removeprefix("triton_")[:60], _number(kernel["microseconds"]), f"{kernel['launches']:g}")
            table.add_row(name, *row)
    return table


def model_table(entry: Mapping[str, Any]) -> Table:
    """One batch size."""
    keys = entry["effective_keys"]
    title = f"model, batch {entry['batch']}, context {entry['context']}, {keys['mean']:.0f} effective keys"
    table = _table(
        title, ("variant", "ms per token", "min", "max", "x compile", "target", "first, s", "logits off"), entry["variants"]
    )
    for name, found in entry["variants"].items():
        if "median_ms" not in found:
            continue
        target = f">= {found['target_times_compile']:g} {_met(found['met'])}" if "target_times_compile" in found else ""
        off = _number(found["difference"]) + (" WRONG" if found["wrong"] else "")
        times = (_number(found[key]) for key in ("median_ms", "min_ms", "max_ms", "times_compile"))
        table.add_row(name, *times, target, _number(found["first_s"]), off)
    return table


def target_table(data: Mapping[str, Any]) -> Table:
    """Every figure that something was promised for, beside the promise."""
    table = _table("targets", ("case", "variant", "figure", "target", ""), {})
    for entry in data.get("operator", []):
        for name, found in entry["variants"].items():
            if "target_over_cudnn" in found:
                figure, target = found["over_cudnn"], f"<= {found['target_over_cudnn']:g}"
                table.add_row(entry["case"], name, f"{_number(figure)} of cuDNN", target, _met(found["met"]))
    for entry in data.get("model", []):
        for name, found in entry["variants"].items():
            if "target_times_compile" in found:
                figure, target = found["times_compile"], f">= {found['target_times_compile']:g}"
                table.add_row(entry["case"], name, f"{_number(figure)} x torch.compile", target, _met(found["met"]))
    return table


def _met(met: bool) -> str:
    return "met" if met else "missed"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _table(title: str, columns: tuple[str, ...], variants: Mapping[str, Any]) -> Table:
    """With what was not run, and why, below it."""
    missing = [f"not run: {name}: {found['not_run']}" for name, found in variants.items() if found.get("not_run")]
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    table.caption, table.caption_justify = "\n".join(missing) or None, "left"
    for position, name in enumerate(columns):
        table.add_column(name, justify="left" if position == 0 else "right")
    return table


def wrong_results(data: Mapping[str, Any]) -> list[str]:
    """What came out wrong, in words; empty when nothing did."""
    sections = [*data.get("operator", []), *data.get("model", []), *data.get("sweep", [])]
    return [
        f"{entry['case']}: {name}"
        for entry in sections
        for name, found in entry.get("variants", {}).items()
        if found.get("wrong")
    ]


def exit_if_wrong(console: Console, data: Mapping[str, Any]) -> None:
    """Say what came out wrong.

    Raises:
        typer.Exit: with status 1, when something did.
    """
    wrong = wrong_results(data)
    if wrong:
        console.print("[red]WRONG:[/] " + "; ".join(wrong))
        raise typer.Exit(1)


def environment(device: torch.device) -> dict[str, object]:
    """Where the figures come from."""
    from importlib import metadata

    versions = {}
    for name in ("torch", "triton", "transformers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = ""
    found: dict[str, object] = {"device": str(device), **versions, "cuda": torch.version.cuda, "rocm": torch.version.hip}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "processors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def print_all(console: Console, *tables: Table) -> None:
    """Only tables that hold something, or say why they do not."""
    for table in tables:
        if table.row_count or table.caption:
            console.print(table)
