"""The backend as the zoo runs it: every graph is rewritten for several options at once, and what became of it is kept.

Tracing a model takes most of the time, so one trace serves all options; :attr:`ZooBackend.selected` says which compiled form a
call goes to. :func:`pass_only` is the one place that knows how passes and runtime fit together without Inductor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

import alignedkv_compile
import alignedkv_compile.reference
from alignedkv_compile.backend import alignedkv
from alignedkv_compile.layout import PLANES_VALID
from alignedkv_compile.ops import quantize_on_write
from alignedkv_compile.options import parse
from alignedkv_compile.outlined import OutlinedGraph
from alignedkv_compile.passes import outline_layers, rewrite_graph
from alignedkv_compile.passes.nodes import is_metadata
from alignedkv_compile.report import GraphReport
from alignedkv_compile.runtime import Runtime
from alignedkv_compile.state.stores import Stores

Compiled = Callable[..., Sequence[object]]
CompileGraph = Callable[[GraphModule, Sequence[object], Mapping[str, object]], tuple[Compiled, GraphReport]]


class _EagerPlanes:
    """Rebuilds planes by calling the write operator, where the product calls what Inductor generated for it."""

    def rebuild(self, planes: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: int) -> None:
        planes.zero_()
        if rows:
            arguments = (planes, key.narrow(2, 0, rows), value.narrow(2, 0, rows), torch.arange(rows), key.shape[2])
            quantize_on_write(*arguments)
        planes[:8].view(torch.int64).fill_(PLANES_VALID)


_STORES = Stores(_EagerPlanes())


def pass_only(gm: GraphModule, example_inputs: Sequence[object], options: Mapping[str, object]) -> tuple[Compiled, GraphReport]:
    """The passes and the runtime; PyTorch's own kernels and the operators' references stand in for Inductor's code.

    Every graph is cut at its layers' borders that can be, however few layers there are.
    """
    choices = parse(None, options)
    rewritten = rewrite_graph(gm, example_inputs, options=choices)
    report = GraphReport("", sites=rewritten.sites)
    outline = outline_layers(rewritten, always=True)
    run = rewritten.module if outline is None else OutlinedGraph(outline, lambda module, *_: module)
    return Runtime(run, rewritten, choices, report, _STORES), report


def compiled(gm: GraphModule, example_inputs: Sequence[object], options: Mapping[str, object]) -> tuple[Compiled, GraphReport]:
    """The product itself."""
    run = alignedkv(gm, example_inputs, options=options)
    return run, alignedkv_compile.report().graphs[-1]


def stock(gm: GraphModule, example_inputs: Sequence[object], options: Mapping[str, object]) -> tuple[Compiled, GraphReport]:
    """Dynamo's graph as it is: the control."""
    return gm, GraphReport("")


@dataclass
class ZooGraph:
    """What became of one of Dynamo's graphs under one set of options.

    Attributes:
        report: the backend's.
        caches: names of graph inputs that held keys or values of a cache in some call, and of which layer; of inputs whose
            data the graph reads, for many a graph asks a cache for its length only.
    """

    report: GraphReport
    caches: dict[str, str]

    def layers(self, *, with_site: bool) -> set[str]:
        """Layers whose cache the graph takes and that a line of the report speaks of, or of which none does."""
        named = {name for site in self.report.sites for name in site.cache}
        seen = {layer for name, layer in self.caches.items() if name in named}
        return seen if with_site else set(self.caches.values()) - seen


class ZooBackend:
    """A Dynamo backend that compiles each graph once per set of options.

    Args:
        variants: options by a name.
        compile_graph: :func:`pass_only`, :func:`compiled` or :func:`stock`.

    Attributes:
        selected: name of the options whose compiled form is called.
        cache: the cache that the calls are about.
        graphs: by name of the options.
    """

    def __init__(self, variants: Mapping[str, Mapping[str, object]], compile_graph: CompileGraph) -> None:
        self._variants = variants
        self._compile_graph = compile_graph
        self.selected = next(iter(variants))
        self.cache: object = None
        self.graphs: dict[str, list[ZooGraph]] = {name: [] for name in variants}

    def __call__(self, gm: GraphModule, example_inputs: Sequence[object]) -> Compiled:
        inputs_read = {
            position: node.name
            for position, node in enumerate(gm.graph.find_nodes(op="placeholder"))
            if not all(map(is_metadata, node.users))
        }
        runs: dict[str, tuple[Compiled, ZooGraph]] = {}
        for name, options in self._variants.items():
            run, report = self._compile_graph(gm, example_inputs, options)
            graph = ZooGraph(report, {})
            self.graphs[name].append(graph)
            runs[name] = run, graph

        def call(*inputs: object) -> Sequence[object]:
            run, graph = runs[self.selected]
            layers = {id(tensor): layer for layer, tensor in keys_and_values(self.cache)}
            taken = ((name, id(inputs[position])) for position, name in inputs_read.items())
            graph.caches |= {name: layers[tensor] for name, tensor in taken if tensor in layers}
            return run(*inputs)

        return call


def layers_of(cache: Any) -> Iterator[tuple[str, Any]]:
    """Each layer of a cache, and of both caches of an encoder-decoder, with a name."""
    parts = {"": cache}
    if hasattr(cache, "self_attention_cache"):
        parts = {"": cache.self_attention_cache, "cross ": cache.cross_attention_cache}
    for prefix, part in parts.items():
        for number, layer in enumerate(getattr(part, "layers", ())):
            yield f"{prefix}{number}", layer


def keys_and_values(cache: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that hold keys or values, each with the name of its layer."""
    for name, layer in layers_of(cache):
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(tensor, torch.Tensor):
                yield name, tensor
