"""Ways of reading a KV cache that `alignedkv eval` compares, as attention over one layer at a time.

A :class:`Method` prepares a layer's cache once and then answers decode steps: one query row over the first ``length`` rows.
Comparison methods (``--compare FILE``) are other implementations of the same two protocols.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

from .. import lowering
from ..arena_memory import zeroed_arena
from ..break_even import LEAST_CONTEXT
from ..layout import arena_layout
from ..ops import COUNTER_FIELDS, aligned_read_attention
from ..options import UNIT_ROUNDOFF
from ..own_kernels import post_grad_pass
from ..plane_builder import PLANE_BUILDER
from ..torch_private import GuardedGraph, compile_function
from .errors import EvaluationError

STOCK = "stock"


@dataclass(frozen=True)
class Step:
    """One decode step's attention.

    Attributes:
        output: ``[1, Hq, 1, Dv]``, float32 unless the method computes in 16 bits.
        bytes_read: bytes of K and V that the method reads, its scales included.
    """

    output: torch.Tensor
    bytes_read: float


class PreparedLayer(Protocol):
    """One layer's cache in the form that a method reads."""

    def attend(self, query: torch.Tensor, length: int, scale: float) -> Step:
        """Attention of ``query [1, Hq, 1, Dk]`` over rows ``[0, length)``, scores multiplied by ``scale``."""


class Method(Protocol):
    """A way of reading the cache."""

    @property
    def name(self) -> str:
        """What tables call it."""

    def prepare(self, key: torch.Tensor, value: torch.Tensor) -> PreparedLayer:
        """Take a layer's ``key [1, H, T, Dk]`` and ``value [1, H, T, Dv]``. Row ``j`` is only looked at by steps with
        ``length > j``, and a step must not depend on rows at or beyond its length."""


class Stock:
    """``scaled_dot_product_attention`` in the cache's dtype, the query heads of a group as rows of one head: what
    ``transformers`` runs for a decode step."""

    name = STOCK

    def prepare(self, key: torch.Tensor, value: torch.Tensor) -> PreparedLayer:
        return _StockLayer(key, value)


@dataclass(frozen=True)
class _StockLayer:
    key: torch.Tensor
    value: torch.Tensor

    def attend(self, query: torch.Tensor, length: int, scale: float) -> Step:
        key, value = self.key[:, :, :length], self.value[:, :, :length]
        rows = query.reshape(1, key.shape[1], -1, query.shape[-1])
        output = scaled_dot_product_attention(rows, key, value, scale=scale)
        return Step(output.reshape(1, query.shape[1], 1, value.shape[-1]), cache_bytes(key, value))


def cache_bytes(key: torch.Tensor, value: torch.Tensor) -> int:
    """Bytes of two cache tensors in their own dtype."""
    return (key.numel() + value.numel()) * key.element_size()


class Aligned:
    """This package's read at one tolerance, through the generated kernel.

    The kernel gets the query in float32, so that its output is not rounded and what the read adds can be measured.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.name = aligned_name(tolerance)
        self._compiled: dict[object, GuardedGraph] = {}

    def prepare(self, key: torch.Tensor, value: torch.Tensor) -> AlignedLayer:
        """The layer's planes, written by the generated code."""
        if key.dtype not in UNIT_ROUNDOFF:
            raise EvaluationError(f"the cache is {key.dtype}; the read knows {', '.join(map(str, UNIT_ROUNDOFF))}")
        key, value = key.contiguous(), value.contiguous()
        planes = zeroed_arena(arena_layout(key, value).total, key.device)
        PLANE_BUILDER.rebuild(planes, key, value, key.shape[2])
        counters = torch.zeros(1, len(COUNTER_FIELDS), dtype=torch.int64)
        return AlignedLayer(self, key, value, planes, counters)

    def kernel(self, args: Sequence[torch.Tensor], scale: float) -> GuardedGraph:
        """The read of ``(query, key, value, planes, live, counters)``, compiled once per dtype and head shape."""
        query, key, value, *_ = args
        shape = (key.dtype, query.shape, key.shape[1], key.shape[3], value.shape[3], scale)
        if shape not in self._compiled:
            self._compiled[shape] = self._compile(args, scale)
        return self._compiled[shape]

    def _compile(self, args: Sequence[torch.Tensor], scale: float) -> GuardedGraph:
        lowering.register()
        tolerance, unit, least = self.tolerance, UNIT_ROUNDOFF[args[1].dtype], LEAST_CONTEXT

        def read(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            planes: torch.Tensor,
            live: torch.Tensor,
            counters: torch.Tensor,
        ) -> tuple[torch.Tensor, ...]:
            options = (None, None, live.shape[0], scale, 0.0, tolerance, unit, least)
            return (aligned_read_attention.counted(query, key, value, planes, *options, counters, 0),)

        return compile_function(read, args, ((), (2,), (2,), (0,), (0,), ()), {}, post_grad_pass("eval"))


def aligned_name(tolerance: float) -> str:
    """What tables call the read at ``tolerance``."""
    return f"alignedkv {tolerance:g}"


@dataclass(frozen=True)
class AlignedLayer:
    """A layer's cache with its planes; ``counters`` (int64 ``[1, len(COUNTER_FIELDS)]``) are those of the last step."""

    method: Aligned
    key: torch.Tensor
    value: torch.Tensor
    planes: torch.Tensor
    counters: torch.Tensor

    def attend(self, query: torch.Tensor, length: int, scale: float) -> Step:
        live = torch.zeros(length, dtype=torch.uint8)  # its size is how a compiled graph gets a symbolic length
        args = (query.float().contiguous(), self.key, self.value, self.planes, live, self.counters)
        self.counters.zero_()
        output = self.method.kernel(args, scale)(*args)[0]
        assert isinstance(output, torch.Tensor)
        return Step(output, int(self.counters[0, COUNTER_FIELDS.index("bytes_read")]))


def load_methods(path: Path) -> tuple[Method, ...]:
    """Methods of a Python file that defines ``METHODS``, a sequence of :class:`Method`.

    Raises:
        EvaluationError: the file cannot be imported or defines no such sequence.
    """
    name = f"alignedkv_compared_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise EvaluationError(f"--compare needs a Python file that defines METHODS; {str(path)!r} is none")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise EvaluationError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    methods = getattr(module, "METHODS", None)
    if not isinstance(methods, Sequence) or not methods:
        raise EvaluationError(f"{path} defines no METHODS, a sequence of objects with a name and a prepare()")
    return tuple(methods)
