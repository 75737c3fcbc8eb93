"""How the GPU benchmarks time: launches from a CUDA graph, inputs that no call before has left in the L2 cache.

A decoding model reads another layer's cache at every call, and launches from a graph. So the same call is captured over enough
copies of its inputs that what it reads of all of them exceeds the L2 cache several times (:func:`copies_needed`), and one graph
goes round them. On a CPU, where the benchmarks only show that they run, :class:`Walked` stands in, with the host's clock.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Call = Callable[..., torch.Tensor]
Inputs = tuple[torch.Tensor, ...]

CACHES = 4.0
"""Bytes read in one round over all copies, in sizes of the L2 cache."""
SMALLEST_SHARE = 0.15
"""Share of a cache's bytes that a read may get away with, when copies are counted."""
FEWEST_CALLS = 16
"""Calls per replay: what a replay costs by itself is divided by them."""
MEMORY_SHARE = 0.3
"""Of the device's free memory that copies may take."""


@dataclass(frozen=True)
class Times:
    """Microseconds per call: one entry per repeat."""

    microseconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.microseconds)

    @property
    def least(self) -> float:
        return min(self.microseconds)

    @property
    def most(self) -> float:
        return max(self.microseconds)


class Captured:
    """A call over all ``inputs``, captured in a CUDA graph.

    The first calls run outside the graph: they compile, load modules and pick cuDNN's plans, none of which a capture allows.

    Args:
        call: returns one tensor.
        inputs: its arguments, one tuple per copy. The caller keeps them alive.

    Attributes:
        output: of the last copy; replays write it.
    """

    def __init__(self, call: Call, inputs: Sequence[Inputs]) -> None:
        rounds = -(-FEWEST_CALLS // len(inputs))
        self._calls = rounds * len(inputs)
        for arguments in [*inputs, inputs[0]][:2]:
            call(*arguments)
        torch.cuda.synchronize()
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call(*inputs[0])  # what a library keeps per stream is there before the capture
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        try:
            # "thread_local": Inductor's own threads may touch the driver meanwhile
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                for _ in range(rounds):
                    for arguments in inputs:
                        self.output = call(*arguments)
        finally:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own in force
        self._graph.replay()
        torch.cuda.synchronize()

    def sample(self) -> float:
        """Microseconds per call of one replay."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._graph.replay()  # keeps the device busy while the host queues what is timed, so that no launch is waited for
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return 1000.0 * start.elapsed_time(end) / self._calls


class Walked:
    """The same on a CPU, by a host clock and without a graph: shows that a benchmark runs, and times nothing that matters."""

    def __init__(self, call: Call, inputs: Sequence[Inputs]) -> None:
        self._call, self._inputs = call, inputs
        self.output = call(*inputs[-1])

    def sample(self) -> float:
        start = time.perf_counter()
        for arguments in self._inputs:
            self.output = self._call(*arguments)
        return 1e6 * (time.perf_counter() - start) / len(self._inputs)


def capture(call: Call, inputs: Sequence[Inputs]) -> Captured | Walked:
    """``call`` over all ``inputs``, ready to be timed, on the device that they are on."""
    return (Captured if inputs[0][0].device.type == "cuda" else Walked)(call, inputs)


def in_turns(captured: dict[str, Captured | Walked], repeats: int) -> dict[str, Times]:
    """Sample all of them ``repeats`` times, in turns, so that a clock that drifts does so under all of them."""
    names, samples = list(captured), {name: list[float]() for name in captured}
    for turn in range(repeats):
        for position in range(len(names)):
            name = names[(turn + position) % len(names)]
            samples[name].append(captured[name].sample())
    return {name: Times(tuple(found)) for name, found in samples.items()}


def copies_needed(cache_bytes: int, copy_bytes: int, device: torch.device) -> int:
    """Copies of inputs that make every read come from memory.

    Args:
        cache_bytes: of K and V in 16 bits.
        copy_bytes: of everything that a copy holds.
        device: where they go; on a CPU, which times nothing, two.
    """
    if device.type != "cuda":
        return 2
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    free, _ = torch.cuda.mem_get_info(device)
    wanted = -(-int(CACHES * l2) // int(SMALLEST_SHARE * cache_bytes))
    return max(1, min(wanted, int(MEMORY_SHARE * free) // copy_bytes))


@dataclass(frozen=True)
class Kernel:
    """What the profiler saw of one kernel.

    Attributes:
        name: of the template that it was made from where Inductor's source says so, else the kernel's own.
        microseconds: per call, all its launches together.
        launches: per call.
    """

    name: str
    microseconds: float
    launches: float


def kernel_times(work: Callable[[], Any], calls: int, device: torch.device, names: dict[str, str]) -> list[Kernel]:
    """Kernels that ``work`` launches, slowest first, by CUPTI's clock (on a CPU: operators, by the host's).

    Args:
        work: launches; not a CUDA graph's capture.
        calls: that ``work`` makes: times and launches are divided by it.
        device: whose activity counts.
        names: kernel to template, see :class:`TemplateNames`.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_cuda = device.type == "cuda"
    try:
        with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as profiler:
            work()
            synchronize(device)
    except RuntimeError as error:  # times without it are worth having
        print(f"no times of kernels: {error}")
        return []
    found: list[Kernel] = []
    for event in profiler.key_averages():
        if on_cuda and event.device_type != DeviceType.CUDA:
            continue  # the host's side of a launch
        microseconds = event.device_time_total if on_cuda else event.self_cpu_time_total
        if microseconds > 0:
            found.append(Kernel(names.get(event.key, event.key), microseconds / calls, event.count / calls))
    return sorted(found, key=lambda kernel: -kernel.microseconds)


class TemplateNames:
    """Which template each kernel that is compiled inside the ``with`` was made from, as Inductor's source states it.

    Kernels of different graphs share names (``..._0``), so that a benchmark keeps one of these per compiled function.

    Attributes:
        found: kernel to template.
    """

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def __enter__(self) -> TemplateNames:
        self._before = {id(module) for module in self._modules()}
        return self

    def __exit__(self, *error: object) -> None:
        for module in self._modules():
            if id(module) not in self._before and getattr(module, "__file__", None):
                self.found |= template_names(Path(module.__file__).read_text())

    @staticmethod
    def _modules() -> list[Any]:
        from torch._inductor.codecache import PyCodeCache

        return list(getattr(PyCodeCache, "modules", ()))


def template_names(source: str) -> dict[str, str]:
    """Kernel to template in one module that Inductor wrote."""
    kernels = re.split(r"^(\w+) = async_compile\.triton\(", source, flags=re.MULTILINE)
    found = {}
    for name, text in zip(kernels[1::2], kernels[2::2], strict=True):
        stated = re.search(r"KERNEL_NAME : tl\.constexpr = '(\w+)'", text)
        if stated:
            found[name] = stated.group(1)
    return found


def synchronize(device: torch.device) -> None:
    """Wait for what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
