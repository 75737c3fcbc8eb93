"""CUDA graphs: the caches that a graph writes must count as inputs that stay where they are.

A CUDA graph writes to the addresses that it was recorded with. Inductor therefore copies every input to an address of its own
before a replay, all but those marked static, and captures nothing at all when a graph writes an input without that mark
("skipping cudagraphs due to mutated inputs"). transformers marks the K, V and ``cumulative_length`` of a ``StaticCache``, but
not when compiled code is the first to use it (a compiled prefill), nor after ``reorder_cache``; other caches may not know of
the mark.

The mark is no promise. Each call compares addresses with the recorded ones, and other addresses, those of another cache say,
mean another recording. So a tensor that moves at every call must not be marked: it would be recorded as often.
"""

from __future__ import annotations

from alignedkv_compile.torch_private import is_attribute, mark_static_input

from .facts import GraphFacts
from .records import Pairing


def mark_written_caches(facts: GraphFacts, pairing: Pairing) -> None:
    """Mark the static caches, and what else the graph writes that hangs on an object as ``cumulative_length`` does.

    A written argument of the call is left alone: it may be a new tensor each time. What the rewriters add is marked as they
    add it.
    """
    caches = {node for pair in pairing.pairs for node in pair.preallocated}
    for node in facts.placeholders:
        if node in caches or (facts.writers(node) and is_attribute(node)):
            mark_static_input(node)
