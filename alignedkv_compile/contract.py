"""What the passes hand to the backend: plain data, and for each pair of caches the object that serves it at every call.

Passes, report and runtime meet here; none of them knows another's insides.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch.fx

from .ops import is_ours
from .reasons import Reason
from .state.stores import Stores


class Outcome(enum.Enum):
    """What became of a site."""

    REWRITTEN = "rewritten"
    PREFILL = "prefill"
    """A query too long for the aligned read: stock attention, planes kept right."""
    DECLINED = "declined"


@dataclass(frozen=True)
class SiteReport:
    """One line of the report: plain data, no graph nodes.

    Attributes:
        index: order of the attention call in its graph.
        outcome: what became of it.
        name: the attention node's name.
        where: module path or source line from the node's metadata, "" when unknown.
        cache: names of the K and V sources.
        shape: query and cache shapes as text.
        reason: why it was declined or left to stock attention; of one that was rewritten for a GPU, below which context
            it reads every bit; else "".
        kind: of the reason, for a declined one.
    """

    index: int
    outcome: Outcome
    name: str
    where: str
    cache: tuple[str, ...]
    shape: str
    reason: str
    kind: Reason | None = None


@dataclass(frozen=True)
class CallSettings:
    """What a binding needs besides its tensors.

    Attributes:
        stores: where planes and buffers are found.
        trust_unversioned: the option ``assume_exclusive_cache``.
        note: takes a remark for the report (planes left stale, and why).
    """

    stores: Stores
    trust_unversioned: bool
    note: Callable[[str], None]


class BoundCache(Protocol):
    """A pair of caches of one compiled graph at run time. Several threads may be inside one graph at once: what belongs to a
    call is in the ``held`` object that it hands around, whatever that is."""

    def before_call(self, args: Sequence[Any], inputs: list[object]) -> object:
        """Fill in the rewritten graph's inputs.

        Args:
            args: Dynamo's inputs.
            inputs: those of the rewritten graph; what Dynamo passes is there already.

        Returns:
            ``held``, for the other two methods.
        """

    def after_call(self, held: Any, args: Sequence[Any], outputs: list[object]) -> None:
        """Remember what the call left behind, and fill in the outputs that the rewritten graph no longer returns."""

    def failed(self, held: Any) -> None:
        """The call raised: some rows may have been written and others not."""


class CacheBinding(Protocol):
    """Which inputs and outputs of a rewritten graph belong to one pair of caches."""

    @property
    def no_cuda_graphs(self) -> str:
        """Why a graph with such a cache is not captured, or ""."""

    def bind(self, settings: CallSettings) -> BoundCache:
        """The run-time side, for one compiled graph."""


@dataclass(frozen=True)
class StatisticsBinding:
    """Tensors in which the reads of a graph record what they did; each has one row per line of the report.

    Attributes:
        counters_input: position of the byte counters among the rewritten graph's inputs, or None when nothing is counted.
        bounds_input: position of the certificates among them, or None when reads are not certified.
        query_heads: of the read that each row belongs to; 0 where there is none.
    """

    counters_input: int | None
    bounds_input: int | None
    query_heads: tuple[int, ...]


@dataclass(frozen=True)
class Where:
    """A value of a call.

    Attributes:
        is_output: whether it is one of the outputs that were added for shadow checks, or an input of the rewritten graph.
        index: its position among these.
    """

    is_output: bool
    index: int


@dataclass(frozen=True)
class CacheRows:
    """K and V in cache tensors.

    Attributes:
        key, value: places of these tensors.
    """

    key: Where
    value: Where


@dataclass(frozen=True)
class PackedRows:
    """K and V in an arena that is the cache.

    Attributes:
        planes: the arena's place.
        capacity: its rows for each head, or their place.
        heads, value_dim, dtype, storage: constants of the read, see :data:`alignedkv_compile.ops.packed_read_attention`.
    """

    planes: Where
    capacity: int | Where
    heads: int
    value_dim: int
    dtype: torch.dtype
    storage: str


@dataclass(frozen=True)
class ShadowRead:
    """Where a shadow check finds what one read read and made.

    Attributes:
        site: the line of the report.
        query, result: places of these tensors.
        rows: where K and V are.
        mask, sinks: places, or None when the read has none.
        length: live rows, or their place.
        scale, softcap, unit_roundoff: constants of the read.
    """

    site: int
    query: Where
    rows: CacheRows | PackedRows
    mask: Where | None
    sinks: Where | None
    result: Where
    length: int | Where
    scale: float
    softcap: float
    unit_roundoff: float


@dataclass(frozen=True)
class RewrittenGraph:
    """What the passes hand to the backend.

    Attributes:
        module: the rewritten copy of Dynamo's graph.
        example_inputs: fakes for ``module``, in its placeholder order.
        kept_inputs: for the leading inputs of ``module``: their positions among Dynamo's example inputs.
        kept_outputs: positions among Dynamo's outputs that ``module`` still returns, in order.
        outputs: how many outputs Dynamo expects.
        caches: what the runtime must bind at each call, one for each pair of caches.
        statistics: the tensors in which reads record what they did.
        sites: one report line for each attention call over a cache.
        shadow: the reads that shadow checks look at; what they need of the graph are its last outputs.
    """

    module: torch.fx.GraphModule
    example_inputs: tuple[object, ...]
    kept_inputs: tuple[int, ...]
    kept_outputs: tuple[int, ...]
    outputs: int
    caches: tuple[CacheBinding, ...]
    statistics: StatisticsBinding
    sites: tuple[SiteReport, ...]
    shadow: tuple[ShadowRead, ...] = ()

    @property
    def is_changed(self) -> bool:
        """Whether anything runs our operators; a graph without them is stock Inductor's."""
        return bool(self.caches) or any(is_ours(node.target) for node in self.module.graph.nodes)

    @property
    def no_cuda_graphs(self) -> str:
        """Why the graph is not captured, or ""."""
        return next((binding.no_cuda_graphs for binding in self.caches if binding.no_cuda_graphs), "")
