"""Latent attention over preallocated latents (``StaticCache``): latents and rope keys side by side, with planes, as well.

    latent_cache.index_copy_(2, positions, new_latent)       # placeholders, written in place
    rope_cache.index_copy_(2, positions, new_rope)
  + rows = cat((new_latent, new_rope), -1)
  + joined.index_copy_(2, positions, rows)                   # [B, 1, C, R + Dr], an input
  + alignedkv.quantize_on_write(planes, rows, new_latent, positions, capacity)
  - the expansion of all latents, and the attention over it (:mod:`.latent`)
  + aligned_read_attention(absorbed query, joined, latent_cache, planes, mask, length=capacity, ...)

The model's cache stays authoritative (:mod:`alignedkv_compile.state.joined`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from alignedkv_compile.break_even import ReadShape
from alignedkv_compile.contract import CallSettings, Outcome
from alignedkv_compile.ops import quantize_on_write
from alignedkv_compile.reasons import Reason
from alignedkv_compile.state.joined import Joined, JoinedKeys

from ..attention import site_over
from ..editor import GraphEditor
from ..facts import GraphFacts
from ..nodes import Declined, constant, fake
from ..records import AttentionCall, AttentionSite, CacheOperand
from ..replace_attention import StatisticsInputs, TensorRead, mask_of, replace_attention
from ..views import Repeats
from ..worth import AlignmentOptions
from .kind import CandidateCall, Expected, Positions, WrittenCache
from .latent import (
    UNCERTIFIABLE,
    Expansion,
    absorbed,
    check_expansion,
    erase_expansions,
    expansion,
    join,
    known_expansion,
    latent_read_shape,
    latents_behind,
)
from .planes import planes_placeholder
from .static import WritePair, write_pairs, written_cache


class LatentStaticKind:
    """K and V expanded from placeholders that the graph writes rows of."""

    name = "static latents"
    uncertifiable = UNCERTIFIABLE

    def read_shape(self, site: AttentionSite) -> ReadShape:
        return latent_read_shape(site, fixed_rows=True)

    def claims(self, rows: Node, facts: GraphFacts) -> bool:
        behind = latents_behind(rows, facts)
        return bool(behind) and all(written_cache(node, facts) is not None for node in behind)

    def site(self, candidate: CandidateCall, facts: GraphFacts) -> AttentionSite:
        found = expansion(candidate.key.base, candidate.value.base, facts)
        latent, rope = (written_cache(node, facts) for node in (found.latent, found.rope))
        assert latent is not None
        assert rope is not None
        try:
            check_expansion(found, candidate, latent, rope, facts)
            if not bool(fake(latent).shape[2] == fake(rope).shape[2]):
                raise Declined(Reason.LENGTH, "latents and rope keys have different numbers of rows")
            _check_order(write_pairs(latent, rope, facts), found, candidate.call, facts)
            key = CacheOperand(latent, found.key, candidate.key.chain, Repeats(1))
            return site_over(
                candidate.call, self, candidate.index, key, CacheOperand(rope, found.value, candidate.value.chain, Repeats(1))
            )
        except Declined as refusal:
            raise Declined(refusal.reason, str(refusal), (latent, rope)) from None

    def pair(self, sites: Sequence[AttentionSite], facts: GraphFacts) -> LatentPair | None:
        rewritten = [site for site in sites if site.outcome is Outcome.REWRITTEN]
        if not rewritten:
            return None
        latent, rope = sites[0].key.source, sites[0].value.source
        expansions = tuple((site, known_expansion(site, facts)) for site in rewritten)
        return LatentPair(latent, rope, write_pairs(latent, rope, facts), expansions)

    def written_by(self, node: Node, facts: GraphFacts) -> WrittenCache | None:
        return None


LATENT_STATIC = LatentStaticKind()


@dataclass(frozen=True)
class LatentPair:
    """A cache ``[B, 1, C, R]`` of latents and one ``[B, 1, C, Dr]`` of rope keys.

    Attributes:
        writes: every write of the pair in the graph, latents as K and rope keys as V.
        expansions: the REWRITTEN calls over the pair, each with what expands the latents for it.
    """

    latent: Node
    rope: Node
    writes: tuple[WritePair, ...]
    expansions: tuple[tuple[AttentionSite, Expansion], ...]

    @property
    def sites(self) -> tuple[AttentionSite, ...]:
        return tuple(site for site, _ in self.expansions)

    @property
    def preallocated(self) -> tuple[Node, ...]:
        return self.latent, self.rope

    def expected(self, options: AlignmentOptions) -> Expected:
        chains = {node.name for site in self.sites for node in (*site.key.chain, *site.value.chain)}
        expanded = {node.name for _, found in self.expansions for node in found.nodes}
        return Expected(frozenset(chains | expanded), frozenset(), len(self.writes) if options.tolerance > 0 else 0)

    def rewrite(
        self, number: int, editor: GraphEditor, options: AlignmentOptions, statistics: StatisticsInputs
    ) -> LatentInputs:
        inputs = self._inputs(number, editor, with_planes=options.tolerance > 0)
        for write in self.writes:
            with editor.after_both(write.key.node, write.value.node):
                latent, rope, positions = write.rows(editor)
                rows = join(latent, rope, editor)
                editor.method("index_copy_", inputs.joined, 2, positions, rows)
                if inputs.planes is not None:
                    capacity = editor.size(self.latent, 2)
                    editor.function(quantize_on_write.default, inputs.planes, rows, latent, positions, capacity)
        for site, found in self.expansions:
            replace_attention(site, editor, options, statistics, functools.partial(self._read, inputs, found))
        erase_expansions([found for _, found in self.expansions], editor)
        return inputs

    def _read(self, inputs: LatentInputs, found: Expansion, site: AttentionSite, editor: GraphEditor) -> TensorRead:
        capacity = editor.size(self.latent, 2)
        read = TensorRead(inputs.joined, self.latent, inputs.planes, length=capacity, mask=mask_of(site, editor))
        return absorbed(read, found, site, editor)

    def _inputs(self, number: int, editor: GraphEditor, *, with_planes: bool) -> LatentInputs:
        latent = fake(self.latent)
        width = constant(latent.shape[3]) + constant(fake(self.rope).shape[3])
        shape = (*latent.shape[:3], width)
        joined = editor.placeholder(f"alignedkv_joined_{number}", shape, latent.dtype, latent.device)
        planes = planes_placeholder(joined, self.latent, number, editor) if with_planes else None
        return LatentInputs(self.latent, self.rope, joined, planes)


@dataclass(frozen=True)
class LatentInputs:
    """The cache's placeholders, and those of what stands beside it."""

    latent: Node
    rope: Node
    joined: Node
    planes: Node | None
    dropped_outputs: frozenset[Node] = frozenset()

    def binding(self, positions: Positions) -> LatentBinding:
        inputs, now = positions.inputs, positions.now
        return LatentBinding(
            latent_input=inputs.index(self.latent),
            rope_input=inputs.index(self.rope),
            joined_input=now.index(self.joined),
            planes_input=None if self.planes is None else now.index(self.planes),
        )


@dataclass(frozen=True)
class LatentBinding:
    """Latents and rope keys side by side, beside the cache that holds them apart.

    Attributes:
        latent_input, rope_input: positions of the cache tensors among Dynamo's example inputs.
        joined_input, planes_input: positions among the rewritten graph's inputs; ``planes_input`` is None at tolerance 0.
    """

    latent_input: int
    rope_input: int
    joined_input: int
    planes_input: int | None
    no_cuda_graphs: str = ""

    def bind(self, settings: CallSettings) -> BoundLatents:
        return BoundLatents(self, settings)


class BoundLatents:
    """Hands what stands beside whatever pair of caches comes to the graph, and remembers the caches as the call left them."""

    def __init__(self, binding: LatentBinding, settings: CallSettings) -> None:
        self._binding = binding
        self._settings = settings
        self._joined = settings.stores.of(JoinedKeys)

    def before_call(self, args: Sequence[Any], inputs: list[object]) -> Joined:
        binding = self._binding
        held = self._joined.before_call(
            args[binding.latent_input],
            args[binding.rope_input],
            with_planes=binding.planes_input is not None,
            trust_unversioned=self._settings.trust_unversioned,
        )
        if held.note:
            self._settings.note(held.note)
        inputs[binding.joined_input] = held.rows
        if binding.planes_input is not None:
            inputs[binding.planes_input] = held.planes
        return held

    def after_call(self, held: Joined, args: Sequence[Any], outputs: list[object]) -> None:
        self._joined.after_call(held, args[self._binding.latent_input], args[self._binding.rope_input])

    def failed(self, held: Joined) -> None:
        """It has been forgotten already: the next call copies the cache."""


def _check_order(writes: Sequence[WritePair], found: Expansion, call: AttentionCall, facts: GraphFacts) -> None:
    """What was expanded must be what the cache holds when the attention runs.

    Raises:
        Declined: the cache is written in between, or only after the attention.
    """
    first, last = facts.order[found.product], facts.order[call.node]
    first = min(first, *(facts.order[node] for node in found.joins))
    written = [facts.order[one.node] for write in writes for one in (write.key, write.value)]
    if any(first < position < last for position in written):
        raise Declined(Reason.WRITE_ORDER, "the cache is written between the expansion of its latents and the attention")
    if not any(position < first for position in written):
        raise Declined(Reason.WRITE_ORDER, "the cache is written after the attention reads it")
