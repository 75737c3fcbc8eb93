"""Copying the graph that Dynamo hands to a backend.

Dynamo keeps using its own graph after the backend returns (it reads ``placeholder.meta["grapharg"]``), so placeholders may
only be added to, or removed from, a copy.
"""

from __future__ import annotations

import torch.fx
from torch.fx import GraphModule, Node

_SOURCES = "_param_name_to_source"
"""What AOTAutograd looks up on the module by name. The other such name, ``_backend_id``, stays behind: under it
``torch._dynamo.config.caching_precompile`` would store the rewritten graph for a later process to call in place of the whole
backend, without the inputs that the runtime adds."""


def copy_graph(module: GraphModule) -> GraphModule:
    """A module that shares parameters and submodules with ``module`` and owns a copy of its graph.

    ``Graph.graph_copy`` carries each node's ``meta``; the sources of the placeholders (``_dynamo_source``) and the module's
    attributes that AOTAutograd needs are carried over here.
    """
    graph = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    returned = graph.graph_copy(module.graph, copies)
    graph.output(returned)
    graph.output_node().meta.update(module.graph.output_node().meta)
    for original, copied in copies.items():
        if hasattr(original, "_dynamo_source"):
            copied._dynamo_source = original._dynamo_source
    result = GraphModule(module, graph)
    result.meta.update(module.meta)
    if hasattr(module, _SOURCES):
        setattr(result, _SOURCES, getattr(module, _SOURCES))
    return result
