"""What a kind of KV cache is to the passes: a module of this folder that fills in these protocols, and an entry in ``KINDS``.

The pipeline, the editor, the verifier and the report know kinds by these protocols only. The way of one pair of caches:

    CacheKind.claims    is this operand of attention such a cache?
    CacheKind.site      the record of one call over it, or Declined with the reason
    CacheKind.pair      the calls over one pair of caches -> CachePair, or Declined
    CachePair.rewrite   edits the graph                   -> RewrittenPair
    RewrittenPair.binding  positions instead of nodes     -> alignedkv_compile.contract.CacheBinding, which serves every call
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch.fx import Node

from alignedkv_compile.break_even import ReadShape
from alignedkv_compile.contract import CacheBinding

from ..editor import GraphEditor
from ..facts import GraphFacts
from ..records import AttentionCall, AttentionSite
from ..replace_attention import StatisticsInputs
from ..views import Fold
from ..worth import AlignmentOptions


@dataclass(frozen=True)
class CandidateCall:
    """An attention call whose operands are both claimed by one kind.

    Attributes:
        index: its line in the report.
        key, value: the operands, followed back through views.
    """

    call: AttentionCall
    key: Fold
    value: Fold
    index: int


@dataclass(frozen=True)
class WrittenCache:
    """A cache that a node writes, for the report of those that no attention reads.

    Attributes:
        source: its placeholder.
        rows: the tensor that holds the rows after the write.
        group: equal for K and V of one layer.
    """

    source: Node
    rows: Node
    group: object


@dataclass(frozen=True)
class Expected:
    """What the rewrite of one pair may change; computed before it, checked after it.

    Attributes:
        removed: names of the nodes that may go, besides the attention calls.
        metadata: names of nodes that ask for sizes, which may go and whose users may change.
        writes: how many times rows are quantized.
        packed_reads: how many of the calls become reads of an arena that is the cache.
    """

    removed: frozenset[str]
    metadata: frozenset[str]
    writes: int
    packed_reads: int = 0


@dataclass(frozen=True)
class Positions:
    """Where nodes are among inputs and outputs.

    Attributes:
        inputs, outputs: of Dynamo's graph; some nodes are no longer in the rewritten one.
        now: the rewritten graph's inputs.
    """

    inputs: tuple[Node, ...]
    outputs: tuple[object, ...]
    now: tuple[Node, ...]

    def returned(self, node: Node) -> tuple[int, ...]:
        """Positions at which Dynamo's graph returns a node."""
        return tuple(position for position, value in enumerate(self.outputs) if value is node)


class RewrittenPair(Protocol):
    """One pair of caches in the edited graph."""

    @property
    def dropped_outputs(self) -> frozenset[Node]:
        """What the graph no longer returns; the binding fills it in."""

    def binding(self, positions: Positions) -> CacheBinding:
        """What serves the pair at each call."""


class CachePair(Protocol):
    """K and V of one layer (or of several that share them), with all attention over them."""

    @property
    def sites(self) -> tuple[AttentionSite, ...]:
        """The calls over the pair that are REWRITTEN or PREFILL."""

    @property
    def preallocated(self) -> tuple[Node, ...]:
        """Inputs that are written in place and stay where they are from call to call."""

    def expected(self, options: AlignmentOptions) -> Expected:
        """What :meth:`rewrite` may change."""

    def rewrite(
        self, number: int, editor: GraphEditor, options: AlignmentOptions, statistics: StatisticsInputs
    ) -> RewrittenPair | None:
        """Edit the graph; None when there is nothing to bind.

        Args:
            number: of the pair in its graph, for the placeholders' names.
        """


class CacheKind(Protocol):
    """How one kind of cache is written and read."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def uncertifiable(self) -> str:
        """Why the certificate of a read says nothing about the attention's output, or ""."""

    def read_shape(self, site: AttentionSite) -> ReadShape | None:
        """What the time of a read of a site's cache depends on; None for one that is made of planes, so that none are kept
        beside it."""

    def claims(self, rows: Node, facts: GraphFacts) -> bool:
        """Whether an operand of attention, views folded away, is such a cache."""

    def site(self, candidate: CandidateCall, facts: GraphFacts) -> AttentionSite:
        """The record of one call.

        Raises:
            Declined: with the reason.
        """

    def pair(self, sites: Sequence[AttentionSite], facts: GraphFacts) -> CachePair | None:
        """All calls over one pair of caches; None when nothing needs to be done for them.

        Raises:
            Declined: with the reason.
        """

    def written_by(self, node: Node, facts: GraphFacts) -> WrittenCache | None:
        """The cache that a node writes, if it is of this kind."""
