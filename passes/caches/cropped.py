"""Attention over a sliding window that is concatenated and cropped each step (``DynamicSlidingWindowLayer``).

  - key = cat([past_key, new_key], -2)                       # past_key: a graph input, the last W - 1 rows
  - kept_key = key[:, :, -(W - 1):, :]                       # a graph output: the next past
  + position, an input: int64 [1], where the past begins in the buffer
  + positions = arange(new_rows) + position + past_length
  + key_buffer.index_copy_(2, positions, new_key)            # [B, H, capacity, D], capacity a symbol of its own
  + alignedkv.quantize_on_write(planes, new_key, new_value, positions, capacity)
  + mask = zeros(capacity).index_copy(-1, arange(past_length + new_rows) + position, mask)
  - scaled_dot_product_attention(query, key, value, mask)
  + alignedkv.aligned_read_attention(query, key_buffer, value_buffer, planes, mask, length=capacity, ...)

:mod:`.append` is what becomes of the concatenation: a buffer whose first live row moves.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from alignedkv_compile.break_even import ReadShape
from alignedkv_compile.reasons import Reason

from ..facts import GraphFacts
from ..nodes import Declined, operation, row_slice
from ..records import AttentionSite
from ..worth import read_shape
from .append import AppendPair, append_pair, append_site
from .concatenation import Concatenation, concatenation
from .kind import CandidateCall, WrittenCache


class CroppedKind:
    """Concatenations of a graph input with new rows, of which the graph returns the last rows."""

    name = "cropped"
    uncertifiable = ""

    def read_shape(self, site: AttentionSite) -> ReadShape:
        return read_shape(site, fixed_rows=False)

    def claims(self, rows: Node, facts: GraphFacts) -> bool:
        return _cropped(rows, facts) is not None

    def site(self, candidate: CandidateCall, facts: GraphFacts) -> AttentionSite:
        key, value = _parts(candidate.key.base, facts), _parts(candidate.value.base, facts)
        if key.kept_rows != value.kept_rows:
            raise Declined(Reason.LENGTH, "K and V are windows of different lengths")
        return append_site(self, candidate, key, value, facts)

    def pair(self, sites: Sequence[AttentionSite], facts: GraphFacts) -> AppendPair | None:
        return append_pair(sites, _parts(sites[0].key.rows, facts), _parts(sites[0].value.rows, facts), facts)

    def written_by(self, node: Node, facts: GraphFacts) -> WrittenCache | None:
        parts = _cropped(node, facts)
        return None if parts is None else WrittenCache(parts.past, node, "cat")


CROPPED = CroppedKind()


def _cropped(result: Node, facts: GraphFacts) -> Concatenation | None:
    """A concatenation of whose last rows the graph returns a slice, and not the concatenation itself."""
    parts = concatenation(result)
    if parts is None or result in facts.outputs:
        return None
    for reader in result.users:
        rows = _kept_rows(reader) if reader.args[:1] == (result,) else None
        if rows is not None and reader in facts.outputs and all(operation(user) == "output" for user in reader.users):
            return parts.cropped_to(reader, rows)
    return None


def _parts(result: Node, facts: GraphFacts) -> Concatenation:
    parts = _cropped(result, facts)
    assert parts is not None
    return parts


def _kept_rows(node: Node) -> int | None:
    """``n`` of ``x[:, :, -n:, :]``."""
    rows = row_slice(node)
    if rows is None or rows.stop is not None or rows.step is not None:
        return None
    return -rows.start if isinstance(rows.start, int) and rows.start < 0 else None
