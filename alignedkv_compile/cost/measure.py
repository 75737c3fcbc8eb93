"""Times of the aligned read and of the 16-bit stream on this machine, of the very kernel that a graph would run.

One kernel does both: it streams where the header of the planes says that they are stale. Every timed call finds the cache cold,
as a model does that reads another layer's at each call, and the kernel and its own arrays as the call before, for another
layer, has left them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .. import torch_private
from ..arena import mark
from ..arena_memory import zeroed_arena
from ..break_even import ReadShape
from ..layout import ArenaLayout
from ..ops import COUNTER_FIELDS, aligned_read_attention
from ..own_kernels import compile_alone
from ..plane_builder import PLANE_BUILDER
from .crossover import Timing
from .inputs import made_up_cache, made_up_directions, query_factors

CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)
ROUNDS = 25
"""Turns of each read at each context; with 9, one noisy context could move the crossover by half."""
BREADTHS = (1.0, 0.25, 4.0)
"""Of the attention of the layers that are timed, see :func:`.inputs.query_factors`: a model's, and those that
:func:`.crossover.break_even` takes beside it."""
ROUNDS_BESIDE = 9
"""Turns of the latter; all contexts together say up to which share of the bytes a read pays."""
LARGEST_CACHE = 256 * 2**20
"""Bytes of K, V and planes of a layer at most, of which there are two; longer contexts are left to the trend."""
TURNS = 4
"""KV heads that a thread works on in a call, where a model has so many: with one, what a call does for itself would weigh more
than it does in a model, and the two reads would seem more alike than they are."""
FLUSH_BYTES = 64 * 2**20
"""What is read to make caches cold where the machine does not say how large its last-level cache is."""

Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""K, V and planes."""
Read = Callable[[torch.Tensor, int, Layer], object]
Call = Callable[[Layer], object]


@dataclass(frozen=True)
class Accuracy:
    """What a read has to promise: the option ``tolerance``, and the unit roundoff that it is a multiple of."""

    tolerance: float
    unit_roundoff: float


def measure(read: ReadShape, accuracy: Accuracy) -> tuple[Timing, ...]:
    """Time both reads in turns, over one sequence.

    Args:
        read: on a CPU; its capacity does not matter.
        accuracy: of the aligned read.
    """
    heads = heads_of_a_call(read)
    contexts = [context for context in CONTEXTS if heads * context * _row_bytes(read) <= LARGEST_CACHE] or [CONTEXTS[0]]
    with torch_private.real_tensors():
        generator = torch.Generator().manual_seed(0)
        direction = made_up_directions(heads, read.rows_per_head, read.key_dim, generator)[None].to(read.dtype)
        rows = made_up_cache(heads, contexts[-1], read.key_dim, read.value_dim, read.dtype, generator)
        layers = [_layer(*rows), _layer(*(one.clone() for one in rows))]
        counters = torch.zeros(1, len(COUNTER_FIELDS), dtype=torch.int64)
        kernel = _compiled(read, accuracy, (_as_heads(direction), *layers[0]), counters)
        scores = direction[0].float() @ rows[0].float().mT * read.key_dim**-0.5
        flush = torch.ones(_flush_bytes() // 8, dtype=torch.int64)
        timings = []
        for context in contexts:
            factors = [query_factors(scores[..., :context], breadth).to(read.dtype) for breadth in BREADTHS]
            calls = [partial(kernel, _as_heads(direction * factor), context) for factor in factors]
            shares = [_share(call, layers[0], counters) for call in calls]
            timings.append(_time(context, calls, shares, layers, flush))
        return tuple(timings)


def _layer(key: torch.Tensor, value: torch.Tensor) -> Layer:
    """``[heads, rows, D]`` as a cache of one sequence, with its planes."""
    heads, rows, key_dim = key.shape
    planes = zeroed_arena(ArenaLayout(heads, rows, key_dim, value.shape[2]).total, key.device)
    PLANE_BUILDER.rebuild(planes, key[None], value[None], rows)
    return key[None], value[None], planes


def heads_of_a_call(read: ReadShape) -> int:
    """KV heads of a timed call: those of the model, up to :data:`TURNS` for each thread as far as the longest context fits."""
    threads = torch.get_num_threads()
    fitting = LARGEST_CACHE // (CONTEXTS[-1] * _row_bytes(read))
    return max(1, min(read.pairs, max(threads, min(TURNS * threads, fitting))))


def _row_bytes(read: ReadShape) -> int:
    """Bytes of a row of K, V and planes, at most."""
    return (read.key_dim + read.value_dim) * read.dtype.itemsize * 3 // 2


def _as_heads(query: torch.Tensor) -> torch.Tensor:
    """``[1, heads, rows, D]`` as ``[1, heads * rows, 1, D]``."""
    return query.flatten(1, 2)[:, :, None]


def _compiled(read: ReadShape, accuracy: Accuracy, example: tuple[torch.Tensor, ...], counters: torch.Tensor) -> Read:
    """The read of a layer by a query at so many live rows, compiled for arguments like ``example``: query, K, V and planes."""
    scale = read.key_dim**-0.5

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        planes: torch.Tensor,
        live: torch.Tensor,
        counters: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        numbers = (live.shape[0], scale, 0.0, accuracy.tolerance, accuracy.unit_roundoff, 1)
        return (aligned_read_attention.counted(query, key, value, planes, None, None, *numbers, counters, 0),)

    rows = torch.empty(example[1].shape[2], 0)
    graph = compile_alone(attend, (*example, rows, counters), ((), (), (), (), (0,), ()))

    def call(query: torch.Tensor, context: int, layer: Layer) -> object:
        return graph(query, *layer, rows[:context], counters)

    return call


def _share(call: Call, layer: Layer, counters: torch.Tensor) -> float:
    """Bytes that an aligned read takes over those of the cache."""
    mark(layer[-1], valid=True)
    counters.zero_()
    call(layer)
    counted = dict(zip(COUNTER_FIELDS, counters[0].tolist(), strict=True))
    return counted["bytes_read"] / counted["bytes_full"]


def _time(context: int, calls: Sequence[Call], shares: Sequence[float], layers: Sequence[Layer], flush: torch.Tensor) -> Timing:
    """Times of reads of the first layer: ``calls`` for each of :data:`BREADTHS`, which take ``shares`` of its bytes."""
    timed, other = layers

    def seconds(call: Call, *, aligned: bool) -> float:
        for *_, planes in layers:
            mark(planes, valid=aligned)
        flush.sum()
        call(other)
        started = time.perf_counter()
        call(timed)
        return time.perf_counter() - started

    few: list[list[float]] = [[] for _ in calls]
    every: list[float] = []
    ratios: list[list[float]] = [[] for _ in calls]
    for number in range(ROUNDS + 1):
        streamed = None if number % 2 else seconds(calls[0], aligned=False)
        taken = [seconds(call, aligned=True) for call in (calls if number <= ROUNDS_BESIDE else calls[:1])]
        streamed = seconds(calls[0], aligned=False) if streamed is None else streamed
        if not number:  # the first round warms up
            continue
        every.append(streamed)
        for index, one in enumerate(taken):
            few[index].append(one)
            ratios[index].append(one / streamed)
    median = [statistics.median(each) for each in ratios]
    layers_beside = tuple(zip(shares, median, strict=True))
    return Timing(context, statistics.median(few[0]) * 1e3, statistics.median(every) * 1e3, median[0], layers_beside)


def _flush_bytes() -> int:
    """Twice the last-level cache."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.removesuffix("K")) * 1024 if text.endswith("K") else 0)
    return 2 * max(sizes, default=0) or FLUSH_BYTES
