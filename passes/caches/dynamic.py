"""Attention over a cache that is concatenated anew each step (``DynamicCache``): rows are appended to a growing buffer instead.

  - key = cat([past_key, new_key], -2)                       # past_key: a graph input; key: a graph output
  + positions = arange(new_rows) + past_length
  + key_buffer.index_copy_(2, positions, new_key)            # [B, H, capacity, D], capacity a symbol of its own
  + alignedkv.quantize_on_write(planes, new_key, new_value, positions, capacity)
  - scaled_dot_product_attention(query, key, value, mask)
  + alignedkv.aligned_read_attention(query, key_buffer, value_buffer, planes, mask, length=past_length + new_rows, ...)

:mod:`.append` is what becomes of the concatenation.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from alignedkv_compile.break_even import ReadShape

from ..facts import GraphFacts
from ..records import AttentionSite
from ..worth import read_shape
from .append import AppendPair, append_pair, append_site
from .concatenation import Concatenation, concatenation
from .kind import CandidateCall, WrittenCache


class DynamicKind:
    """Concatenations of a graph input with new rows that the graph returns."""

    name = "dynamic"
    uncertifiable = ""

    def read_shape(self, site: AttentionSite) -> ReadShape:
        return read_shape(site, fixed_rows=False)

    def claims(self, rows: Node, facts: GraphFacts) -> bool:
        return rows in facts.outputs and concatenation(rows) is not None

    def site(self, candidate: CandidateCall, facts: GraphFacts) -> AttentionSite:
        return append_site(self, candidate, _parts(candidate.key.base), _parts(candidate.value.base), facts)

    def pair(self, sites: Sequence[AttentionSite], facts: GraphFacts) -> AppendPair | None:
        return append_pair(sites, _parts(sites[0].key.rows), _parts(sites[0].value.rows), facts)

    def written_by(self, node: Node, facts: GraphFacts) -> WrittenCache | None:
        parts = concatenation(node)
        return WrittenCache(parts.past, node, "cat") if parts is not None and facts.is_returned(node) else None


DYNAMIC = DynamicKind()


def _parts(node: Node) -> Concatenation:
    parts = concatenation(node)
    assert parts is not None
    return parts
