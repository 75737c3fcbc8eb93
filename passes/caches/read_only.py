"""Attention over caches that the graph only reads (cross-attention after the first step): planes are built once.

  - scaled_dot_product_attention(query, key_cache, value_cache, mask)      # placeholders that nothing here writes
  + alignedkv.aligned_read_attention(query, key_cache, value_cache, planes, mask, length=capacity, ...)

K and V that come to a graph as inputs need not be caches: a graph that was broken in two passes them too, new at every call.
Planes are therefore built when the same tensors come unchanged for a second time, and every bit is read until then.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from alignedkv_compile.break_even import ReadShape
from alignedkv_compile.contract import CallSettings, Outcome
from alignedkv_compile.state.sidecar import Sidecar, SidecarStore
from alignedkv_compile.torch_private import is_attribute

from ..attention import check_cache_pair, site_over
from ..editor import GraphEditor
from ..facts import GraphFacts
from ..records import AttentionSite, CacheOperand
from ..replace_attention import StatisticsInputs, TensorRead, mask_of, replace_attention
from ..views import Fold, head_repeats
from ..worth import AlignmentOptions, read_shape
from .kind import CandidateCall, Expected, Positions, WrittenCache
from .planes import planes_placeholder


class ReadOnlyKind:
    """Placeholders that the graph does not write."""

    name = "read-only"
    uncertifiable = ""

    def read_shape(self, site: AttentionSite) -> ReadShape:
        return read_shape(site, fixed_rows=True)

    def claims(self, rows: Node, facts: GraphFacts) -> bool:
        return facts.is_cache_input(rows) and not facts.writers(rows)

    def site(self, candidate: CandidateCall, facts: GraphFacts) -> AttentionSite:
        key, value = candidate.key.base, candidate.value.base
        check_cache_pair(key, value)
        for cache, name in ((key, "K"), (value, "V")):
            facts.check_unshared(cache, name)
        return site_over(candidate.call, self, candidate.index, _operand(candidate.key), _operand(candidate.value))

    def pair(self, sites: Sequence[AttentionSite], facts: GraphFacts) -> ReadOnlyPair | None:
        rewritten = tuple(site for site in sites if site.outcome is Outcome.REWRITTEN)
        return ReadOnlyPair(sites[0].key.source, sites[0].value.source, rewritten) if rewritten else None

    def written_by(self, node: Node, facts: GraphFacts) -> WrittenCache | None:
        return None


READ_ONLY = ReadOnlyKind()


@dataclass(frozen=True)
class ReadOnlyPair:
    """Two placeholders ``[B, H, C, D]`` that are K and V, with the REWRITTEN calls over them."""

    key: Node
    value: Node
    sites: tuple[AttentionSite, ...]

    @property
    def preallocated(self) -> tuple[Node, ...]:
        return tuple(node for node in (self.key, self.value) if is_attribute(node))

    def expected(self, options: AlignmentOptions) -> Expected:
        chains = (node.name for site in self.sites for node in (*site.key.chain, *site.value.chain))
        return Expected(frozenset(chains), frozenset(), 0)

    def rewrite(
        self, number: int, editor: GraphEditor, options: AlignmentOptions, statistics: StatisticsInputs
    ) -> ReadOnlyInputs | None:
        planes = planes_placeholder(self.key, self.value, number, editor) if options.tolerance > 0 else None
        for site in self.sites:
            replace_attention(site, editor, options, statistics, functools.partial(self._read, planes))
        return None if planes is None else ReadOnlyInputs(self.key, self.value, planes)

    def _read(self, planes: Node | None, site: AttentionSite, editor: GraphEditor) -> TensorRead:
        return TensorRead(self.key, self.value, planes, length=editor.size(self.key, 2), mask=mask_of(site, editor))


@dataclass(frozen=True)
class ReadOnlyInputs:
    """A pair of cache placeholders, and that of their planes."""

    key: Node
    value: Node
    planes: Node
    dropped_outputs: frozenset[Node] = frozenset()

    def binding(self, positions: Positions) -> ReadOnlyBinding:
        inputs = positions.inputs
        return ReadOnlyBinding(inputs.index(self.key), inputs.index(self.value), positions.now.index(self.planes))


@dataclass(frozen=True)
class ReadOnlyBinding:
    """Planes of a pair of tensors that the graph only reads; input positions as in ``StaticBinding``."""

    key_input: int
    value_input: int
    planes_input: int
    no_cuda_graphs: str = ""

    def bind(self, settings: CallSettings) -> BoundReadOnly:
        return BoundReadOnly(self, settings)


class BoundReadOnly:
    """Hands the planes of the tensors to the graph, stale ones until the tensors are seen again."""

    def __init__(self, binding: ReadOnlyBinding, settings: CallSettings) -> None:
        self._binding = binding
        self._settings = settings
        self._sidecars = settings.stores.of(SidecarStore)

    def before_call(self, args: Sequence[Any], inputs: list[object]) -> Sidecar:
        key, value = args[self._binding.key_input], args[self._binding.value_input]
        sidecar = self._sidecars.before_read(key, value, trust_unversioned=self._settings.trust_unversioned)
        if sidecar.history.stale_reason:
            self._settings.note(sidecar.history.stale_reason)
        inputs[self._binding.planes_input] = sidecar.planes
        return sidecar

    def after_call(self, held: Sidecar, args: Sequence[Any], outputs: list[object]) -> None:
        """Nothing was written."""

    def failed(self, held: Sidecar) -> None:
        """Nothing was written."""


def _operand(folded: Fold) -> CacheOperand:
    return CacheOperand(folded.base, folded.base, folded.chain, head_repeats(folded))
