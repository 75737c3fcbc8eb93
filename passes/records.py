"""Frozen records that the finders return and the rewriters consume.

Finders only read the graph; a record names the nodes of one cached attention site, or says why there is no rewrite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.fx

from alignedkv_compile.contract import Outcome
from alignedkv_compile.reasons import Reason

from .views import PLAIN, Order, Repeats

if TYPE_CHECKING:
    from .caches.kind import CacheKind, CachePair

MAX_ALIGNED_QUERY_ROWS = 16
"""Longer queries (prefill) keep stock attention."""


@dataclass(frozen=True)
class CacheOperand:
    """The K or V operand of an attention call, traced back to the cache it comes from.

    Attributes:
        source: the placeholder of the cache, or of the past that it grows from; ``[B, H, C, D]``.
        rows: what attention reads, ``[B, H, T, D]``: the cache, or a node that was made of it.
        chain: view, expand and cast nodes between ``rows`` and the attention call, folded away by the rewrite.
        repeats: query heads per KV head that the chain materialises (once when grouped by ``enable_gqa`` or plain MHA).
    """

    source: torch.fx.Node
    rows: torch.fx.Node
    chain: tuple[torch.fx.Node, ...]
    repeats: Repeats


@dataclass(frozen=True)
class MaskTerm:
    """A mask or bias of the scores.

    Attributes:
        node: what the graph has for it; a tensor if the call can be rewritten.
        prohibits: True in a bool mask prohibits a row (``masked_fill``) rather than attends to it.
        folded: it has batch and heads in one dimension.
        factor: what a floating one is multiplied by.
    """

    node: object
    prohibits: bool = False
    folded: bool = False
    factor: float = 1.0


@dataclass(frozen=True)
class AttentionSite:
    """One cached attention call that may be rewritten.

    Attributes:
        index: order of the call among the graph's cached attention calls, from 0; declined ones count too.
        call: the attention call in the normal form of :mod:`.attention`.
        kind: the kind of cache that it reads.
        outcome: ``REWRITTEN``, or ``PREFILL`` when the query is too long (the attention itself is then left alone).
        query: node of ``[B, Hq, Q, Dk]``, or of the same with batch and heads folded into one dimension.
        key, value: the cache operands.
        masks: the call's, once they are known to be tensors that fit.
        scale: the factor on the scores; SDPA's default ``1/sqrt(Dk)`` is filled in.
        query_rows: ``Q``; the example's value where the graph is symbolic in it (PREFILL only).
    """

    index: int
    call: AttentionCall
    kind: CacheKind
    outcome: Outcome
    query: torch.fx.Node
    key: CacheOperand
    value: CacheOperand
    masks: tuple[MaskTerm, ...]
    scale: float
    query_rows: int

    @property
    def attention(self) -> torch.fx.Node:
        """The node whose value the aligned read takes over."""
        return self.call.node


@dataclass(frozen=True)
class AttentionCall:
    """Softmax attention in its normal form, however it is written; constants as they stand in the graph::

        scores = softcap * tanh(scale * query @ key^T / softcap) + mask
        node = softmax([scores, sinks])[..., :-1] @ value

    Attributes:
        node: what the call computes.
        scores: the node that multiplies query and key; ``node`` itself where one operation does everything.
        query, key, value: its operands, as they enter the products; ``[B, H, ...]``, or ``[B * H, ...]`` when ``folded``.
        masks: what is added to the scores or prohibits rows.
        dropout: probability; anything but 0 is declined.
        is_causal, enable_gqa: as ``scaled_dot_product_attention`` takes them.
        scale: None for ``1/sqrt(Dk)``.
        softcap: 0 for none.
        sinks: node of ``[Hq]``, or None.
        folded: whether batch and heads are one dimension of query and keys.
        key_axes, value_axes: how the operands are laid out, see :mod:`.views`.
        inner: nodes between the operands and ``node``, which go when it does.
        refusal: why the call cannot be rewritten whatever it reads, or "".
        product: what multiplies weights and V, where ``node`` comes behind it.
    """

    node: torch.fx.Node
    scores: torch.fx.Node
    query: object
    key: object
    value: object
    masks: tuple[MaskTerm, ...]
    dropout: object
    is_causal: object
    scale: object
    enable_gqa: object
    softcap: float = 0.0
    sinks: torch.fx.Node | None = None
    folded: bool = False
    key_axes: Order = PLAIN
    value_axes: Order = PLAIN
    inner: frozenset[torch.fx.Node] = frozenset()
    refusal: str = ""
    product: torch.fx.Node | None = None

    @property
    def value_reader(self) -> torch.fx.Node:
        """The node that reads V."""
        return self.node if self.product is None else self.product

    @property
    def operands(self) -> frozenset[object]:
        """Everything but K and V that the call reads."""
        return frozenset([self.query, self.sinks, *(term.node for term in self.masks)])


@dataclass(frozen=True)
class DeclinedSite:
    """A cached attention call, or a cache without one, that stays as it is.

    Attributes:
        index: as in :class:`AttentionSite`; caches that no attention call was found for come after all calls.
        node: the attention node, or the first reader of the cache.
        query: the call's query, if there is a call.
        caches: the nodes of K's and V's sources, as far as they are known.
        reason: the kind.
        met: one phrase for the report.
    """

    index: int
    node: torch.fx.Node
    query: object
    caches: tuple[torch.fx.Node, ...]
    reason: Reason
    met: str


@dataclass(frozen=True)
class Findings:
    """What the finders saw: candidate sites, and the calls and caches that are declined."""

    sites: tuple[AttentionSite, ...]
    declined: tuple[DeclinedSite, ...]


@dataclass(frozen=True)
class Pairing:
    """What will be rewritten, cache by cache, and what will not."""

    pairs: tuple[CachePair, ...]
    untouched: tuple[AttentionSite, ...]
    """Calls with nothing to do for them, nor for their caches (PREFILL over a ``cat``)."""
    declined: tuple[DeclinedSite, ...]

    @property
    def sites(self) -> tuple[AttentionSite, ...]:
        """Every call that is not declined."""
        return tuple(site for group in (*(pair.sites for pair in self.pairs), self.untouched) for site in group)

    @property
    def rewritten(self) -> tuple[AttentionSite, ...]:
        """The calls that become aligned reads."""
        return tuple(site for site in self.sites if site.outcome is Outcome.REWRITTEN)
