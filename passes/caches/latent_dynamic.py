"""Latent attention over latents that are concatenated anew each step (``DynamicCache``): rows are appended to growing buffers.

  - latent = cat([past_latent, new_latent], -2)              # pasts: graph inputs; concatenations: graph outputs
  - rope = cat([past_rope, new_rope], -2)
  + rows = cat((new_latent, new_rope), -1)
  + key_buffer.index_copy_(2, positions, rows)               # [B, 1, capacity, R + Dr]
  + value_buffer.index_copy_(2, positions, new_latent)       # [B, 1, capacity, R]
  + alignedkv.quantize_on_write(planes, rows, new_latent, positions, capacity)
  - the expansion of all latents, and the attention over it (:mod:`.latent`)
  + aligned_read_attention(absorbed query, key_buffer, value_buffer, planes, mask, length=past_length + new_rows, ...)

As with other growing caches (:mod:`.dynamic`), the pasts leave the inputs and the concatenations leave the outputs: the caller
gets views of the buffers. So nothing but the attention may read the latents, or what they are expanded to.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from alignedkv_compile.break_even import ReadShape
from alignedkv_compile.contract import Outcome
from alignedkv_compile.reasons import Reason
from alignedkv_compile.state.joined import LatentBuffers

from ..attention import is_prefill, site_over
from ..editor import GraphEditor
from ..facts import GraphFacts
from ..nodes import Declined, constant, fake
from ..records import AttentionSite, CacheOperand
from ..replace_attention import StatisticsInputs, TensorRead, replace_attention
from ..views import Repeats
from ..worth import AlignmentOptions
from .append import (
    AppendInputs,
    BufferInputs,
    LiveRows,
    append_rows,
    buffer_inputs,
    drop_concatenations,
    expected_append,
    live_rows_read,
)
from .concatenation import Concatenation, check_lengths, check_readers, concatenation
from .kind import CandidateCall, Expected, WrittenCache
from .latent import (
    UNCERTIFIABLE,
    Expansion,
    absorbed,
    check_expansion,
    check_private,
    erase_expansions,
    expansion,
    join,
    known_expansion,
    latent_read_shape,
    latents_behind,
)


class LatentDynamicKind:
    """K and V expanded from concatenations of a graph input with new rows that the graph returns."""

    name = "dynamic latents"
    uncertifiable = UNCERTIFIABLE

    def read_shape(self, site: AttentionSite) -> ReadShape:
        return latent_read_shape(site, fixed_rows=False)

    def claims(self, rows: Node, facts: GraphFacts) -> bool:
        behind = latents_behind(rows, facts)
        return bool(behind) and all(node in facts.outputs and concatenation(node) is not None for node in behind)

    def site(self, candidate: CandidateCall, facts: GraphFacts) -> AttentionSite:
        found = expansion(candidate.key.base, candidate.value.base, facts)
        latent, rope = _parts(found)
        try:
            check_expansion(found, candidate, latent.past, rope.past, facts)
            for parts, name in ((latent, "the latent"), (rope, "the rope key")):
                if fake(parts.past).dtype != fake(parts.new).dtype:
                    raise Declined(Reason.DTYPE, "past and new rows have different dtypes")
                if not is_prefill(candidate.call):
                    check_readers(parts, name, facts, frozenset(found.nodes))
            if not is_prefill(candidate.call):
                check_lengths(latent, rope, facts)
            key = CacheOperand(latent.past, found.key, candidate.key.chain, Repeats(1))
            value = CacheOperand(rope.past, found.value, candidate.value.chain, Repeats(1))
            return site_over(candidate.call, self, candidate.index, key, value)
        except Declined as refusal:
            raise Declined(refusal.reason, str(refusal), (latent.past, rope.past)) from None

    def pair(self, sites: Sequence[AttentionSite], facts: GraphFacts) -> LatentAppendPair | None:
        rewritten = tuple(site for site in sites if site.outcome is Outcome.REWRITTEN)
        if not rewritten:
            return None
        expansions = tuple(known_expansion(site, facts) for site in rewritten)
        check_private(expansions, rewritten, facts)
        latent, rope = _parts(expansions[0])
        return LatentAppendPair(latent, rope, int(fake(latent.new).shape[2]), rewritten, expansions)

    def written_by(self, node: Node, facts: GraphFacts) -> WrittenCache | None:
        return None


LATENT_DYNAMIC = LatentDynamicKind()


@dataclass(frozen=True)
class LatentAppendPair:
    """One layer's concatenated latents and rope keys, to be replaced by growing buffers.

    Attributes:
        new_rows: rows appended.
        sites: the attention calls over the pair; all are REWRITTEN.
        expansions: for each site, what expands the latents for it.
    """

    latent: Concatenation
    rope: Concatenation
    new_rows: int
    sites: tuple[AttentionSite, ...]
    expansions: tuple[Expansion, ...]
    preallocated: tuple[Node, ...] = ()

    def expected(self, options: AlignmentOptions) -> Expected:
        chains = {node.name for site in self.sites for node in (*site.key.chain, *site.value.chain)}
        expanded = {node.name for found in self.expansions for node in found.nodes}
        return expected_append((self.latent, self.rope), frozenset(chains | expanded), options)

    def rewrite(
        self, number: int, editor: GraphEditor, options: AlignmentOptions, statistics: StatisticsInputs
    ) -> AppendInputs:
        past = fake(self.latent.past)
        width = constant(past.shape[3]) + constant(fake(self.rope.past).shape[3])
        with editor.fake_mode:
            both = past.new_empty((*past.shape[:3], width))
        buffers = buffer_inputs(both, past, number, editor, with_planes=options.tolerance > 0)
        with editor.after_both(self.latent.result, self.rope.result):
            rows = join(self.latent.new, self.rope.new, editor)
            latents = editor.current(self.latent.new)
            live = append_rows(buffers, past.shape[2], rows, latents, self.new_rows, editor)
        for site, found in zip(self.sites, self.expansions, strict=True):
            replace_attention(site, editor, options, statistics, functools.partial(self._read, buffers, live, found))
        erase_expansions(self.expansions, editor)
        drop_concatenations((self.latent, self.rope), editor)
        return AppendInputs(self.latent, self.rope, self.new_rows, buffers, LatentBuffers)

    def _read(
        self, buffers: BufferInputs, live: LiveRows, found: Expansion, site: AttentionSite, editor: GraphEditor
    ) -> TensorRead:
        return absorbed(live_rows_read(buffers, live, site, editor), found, site, editor)


def _parts(found: Expansion) -> tuple[Concatenation, Concatenation]:
    """The concatenations of latents and of rope keys."""
    latent, rope = concatenation(found.latent), concatenation(found.rope)
    assert latent is not None
    assert rope is not None
    return latent, rope
