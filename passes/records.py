"""Frozen records that the finders return and the rewriters consume.

Finders only read the graph; a record names the nodes of one cached attention site, or says why there is no rewrite.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch.fx

MAX_ALIGNED_QUERY_ROWS = 16
"""Longer queries (prefill) keep stock attention."""


class CacheKind(enum.Enum):
    """How the cache that a site reads is written."""

    STATIC = "index_copy_"
    """A preallocated buffer, one graph input, written in place (``StaticCache``)."""
    DYNAMIC = "cat"
    """``cat([past, new], -2)``: a new tensor every step (``DynamicCache``)."""


class Outcome(enum.Enum):
    """What became of a site."""

    REWRITTEN = "rewritten"
    PREFILL = "prefill"
    """Query longer than :data:`MAX_ALIGNED_QUERY_ROWS`: stock attention, planes kept right."""
    DECLINED = "declined"


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one ``scaled_dot_product_attention`` call, by name; constants as they stand in the graph."""

    node: torch.fx.Node
    query: object
    key: object
    value: object
    mask: object
    dropout: object
    is_causal: object
    scale: object
    enable_gqa: object


@dataclass(frozen=True)
class CacheOperand:
    """The K or V operand of an attention call, traced back to the cache it comes from.

    Attributes:
        source: the placeholder of the cache (STATIC) or of the past (DYNAMIC); ``[B, H, T, D]``.
        write: the ``index_copy_`` or ``cat`` node; with several ``index_copy_`` the last one before the attention.
        new_rows: ``[B, H, S, D]``, what is written this step.
        positions: int64 ``[S]`` rows written (STATIC), or None (DYNAMIC: the rows after the past).
        chain: view, expand and cast nodes between the write and the attention call, folded away by the rewrite.
        repeats: query heads per KV head that the chain materialises (1 when grouped by ``enable_gqa`` or plain MHA).
    """

    source: torch.fx.Node
    write: torch.fx.Node
    new_rows: torch.fx.Node
    positions: torch.fx.Node | None
    chain: tuple[torch.fx.Node, ...]
    repeats: int


@dataclass(frozen=True)
class AttentionSite:
    """One cached attention call that may be rewritten.

    Attributes:
        index: order of the call among the graph's cached attention calls, from 0; declined ones count too.
        attention: the ``scaled_dot_product_attention`` node.
        kind: how its cache is written.
        outcome: ``REWRITTEN``, or ``PREFILL`` when the query is too long (the attention itself is then left alone).
        query: node, ``[B, Hq, Q, Dk]``.
        key, value: the cache operands.
        mask: node or None.
        scale: the factor on the scores; SDPA's default ``1/sqrt(Dk)`` is filled in.
        query_rows: ``Q``; the example's value where the graph is symbolic in it (PREFILL only).
    """

    index: int
    attention: torch.fx.Node
    kind: CacheKind
    outcome: Outcome
    query: torch.fx.Node
    key: CacheOperand
    value: CacheOperand
    mask: torch.fx.Node | None
    scale: float
    query_rows: int


@dataclass(frozen=True)
class DeclinedSite:
    """A cached attention call, or a cache without one, that stays as it is.

    Attributes:
        index: as in :class:`AttentionSite`; caches that no attention call was found for come after all calls.
        node: the attention node, or the first reader of the cache.
        caches: the nodes of K's and V's sources, as far as they are known.
        reason: one phrase for the report.
    """

    index: int
    node: torch.fx.Node
    caches: tuple[torch.fx.Node, ...]
    reason: str


@dataclass(frozen=True)
class WritePair:
    """One step's write of K and of V into a pair of preallocated caches, at the same positions."""

    key: torch.fx.Node
    value: torch.fx.Node
    new_key: torch.fx.Node
    new_value: torch.fx.Node
    positions: torch.fx.Node


@dataclass(frozen=True)
class StaticPair:
    """Two placeholders ``[B, H, C, D]`` that are one layer's K and V, or several layers' that share them.

    Attributes:
        key, value: the placeholders.
        writes: every write of the pair in the graph, in order.
        sites: the attention calls over it that are REWRITTEN or PREFILL.
    """

    key: torch.fx.Node
    value: torch.fx.Node
    writes: tuple[WritePair, ...]
    sites: tuple[AttentionSite, ...]


@dataclass(frozen=True)
class AppendPair:
    """One layer's concatenated K and V, to be replaced by a growing buffer.

    Attributes:
        key, value: placeholders of the past, ``[B, H, P, D]``.
        key_result, value_result: the ``cat`` nodes.
        new_key, new_value: ``[B, H, S, D]``, the rows appended.
        new_rows: ``S``.
        sites: the attention calls over the pair; all are REWRITTEN.
    """

    key: torch.fx.Node
    value: torch.fx.Node
    key_result: torch.fx.Node
    value_result: torch.fx.Node
    new_key: torch.fx.Node
    new_value: torch.fx.Node
    new_rows: int
    sites: tuple[AttentionSite, ...]


@dataclass(frozen=True)
class Findings:
    """What the finders saw: candidate sites, and the calls and caches that are declined."""

    sites: tuple[AttentionSite, ...]
    declined: tuple[DeclinedSite, ...]


@dataclass(frozen=True)
class Pairing:
    """What will be rewritten, cache by cache, and what will not."""

    static: tuple[StaticPair, ...]
    append: tuple[AppendPair, ...]
    untouched: tuple[AttentionSite, ...]
    """PREFILL calls over a ``cat``: nothing to do for them."""
    declined: tuple[DeclinedSite, ...]

    @property
    def sites(self) -> tuple[AttentionSite, ...]:
        """Every call that is not declined."""
        groups = (*(pair.sites for pair in self.static), *(pair.sites for pair in self.append), self.untouched)
        return tuple(site for group in groups for site in group)

    @property
    def rewritten(self) -> tuple[AttentionSite, ...]:
        """The calls that become aligned reads."""
        return tuple(site for site in self.sites if site.outcome is Outcome.REWRITTEN)


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
    """

    index: int
    outcome: Outcome
    name: str
    where: str
    cache: tuple[str, ...]
    shape: str
    reason: str


@dataclass(frozen=True)
class StaticBinding:
    """A plane arena that rides beside a pair of preallocated cache tensors.

    Attributes:
        key_input, value_input: positions of the cache tensors among Dynamo's example inputs.
        planes_input: position of the arena among the rewritten graph's inputs.
    """

    key_input: int
    value_input: int
    planes_input: int


@dataclass(frozen=True)
class AppendBinding:
    """A growing buffer that stands in for one layer's concatenated K and V.

    Attributes:
        key_input, value_input: positions of the past tensors among Dynamo's example inputs (they are not passed on).
        key_buffer_input, value_buffer_input, planes_input: positions among the rewritten graph's inputs; ``planes_input`` is
            None at tolerance 0.
        key_outputs, value_outputs: positions among Dynamo's graph outputs that the caller fills with views of the
            buffers' live prefix; the rewritten graph does not return them.
        new_rows: how many rows a call appends (query lengths are specialised, so it is an int).
        largest_capacity: rows that the compiled code can address in a buffer, or None.
    """

    key_input: int
    value_input: int
    key_buffer_input: int
    value_buffer_input: int
    planes_input: int | None
    key_outputs: tuple[int, ...]
    value_outputs: tuple[int, ...]
    new_rows: int
    largest_capacity: int | None = None


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
class RewrittenGraph:
    """What the pipeline hands to the backend.

    Attributes:
        module: the rewritten copy of Dynamo's graph.
        example_inputs: fakes for ``module``, in its placeholder order.
        kept_inputs: for the leading inputs of ``module``: their positions among Dynamo's example inputs.
        kept_outputs: positions among Dynamo's outputs that ``module`` still returns, in order.
        outputs: how many outputs Dynamo expects.
        static, append: what the runtime must bind at each call.
        statistics: the tensors in which reads record what they did.
        sites: one report line for each attention call over a cache.
    """

    module: torch.fx.GraphModule
    example_inputs: tuple[object, ...]
    kept_inputs: tuple[int, ...]
    kept_outputs: tuple[int, ...]
    outputs: int
    static: tuple[StaticBinding, ...]
    append: tuple[AppendBinding, ...]
    statistics: StatisticsBinding
    sites: tuple[SiteReport, ...]
