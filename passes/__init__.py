"""The passes: attention over a KV cache becomes quantize-on-write and aligned read, on a copy of Dynamo's graph.

:func:`rewrite_graph` is the whole pipeline; each of its stages is a file of this folder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import GraphModule

from alignedkv_compile.contract import RewrittenGraph

from .facts import gather_facts
from .find import find_sites
from .graph_copy import copy_graph
from .outline import outline_layers
from .pair import pair_caches
from .rewrite import rewrite_pairs
from .site_report import report_sites
from .static_inputs import mark_written_caches
from .verify import snapshot, verify_rewrite
from .worth import AlignmentOptions, leave_long_queries

__all__ = ["outline_layers", "rewrite_graph"]


def rewrite_graph(gm: GraphModule, example_inputs: Sequence[object], *, options: AlignmentOptions) -> RewrittenGraph:
    """Rewrite every cached attention call of a graph that can be, and say of each other one why not.

    Args:
        gm: what Dynamo passes to a backend; it is not changed.
        example_inputs: likewise.
        options: the backend's :class:`~alignedkv_compile.options.Options`.

    Returns:
        The rewritten copy, and what the runtime must bind when it calls it.

    Raises:
        GraphVerificationError: the passes have a defect.
    """
    needs_gradients = any(isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs)
    inference_only = not (torch.is_grad_enabled() and needs_gradients)

    module = copy_graph(gm)
    facts = gather_facts(module.graph, inference_only=inference_only)
    findings = leave_long_queries(find_sites(facts, certified=options.certified), options)
    pairing = pair_caches(findings, facts)
    report = report_sites(pairing, options)
    before = snapshot(module, pairing, options)
    if options.cuda_graphs:
        mark_written_caches(facts, pairing)
    rewriting = rewrite_pairs(module, pairing, options, sites=len(report))
    verify_rewrite(module, before, pairing, rewriting.editor, options)
    module.recompile()
    return rewriting.result(module, example_inputs, report)
