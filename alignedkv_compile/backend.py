"""``torch.compile(model, backend="alignedkv")``: options, graph passes, Inductor, and the runtime around the compiled graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch.fx

from . import lowering, passes, torch_private
from .around_compilations import install
from .contract import Outcome, SiteReport
from .cost import priced
from .errors import DeclinedError, UnknownOptionError
from .logs import describe_site, log_rewritten, log_sites
from .options import Options, parse
from .outlined import OutlinedGraph
from .own_kernels import post_grad_pass
from .reasons import Reason
from .report import REGISTRY, GraphReport
from .runtime import Runtime

_log = logging.getLogger(__name__)


def alignedkv(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[object],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
    **unknown: object,
) -> Callable[..., Sequence[object]]:
    """The Dynamo backend: rewrite attention over a KV cache into aligned reads, compile with Inductor.

    Args:
        gm: Dynamo's graph; never edited.
        example_inputs: its inputs, fake tensors and ints.
        mode: as Inductor takes it, see :data:`alignedkv_compile.options.MODES`.
        options: see :class:`alignedkv_compile.Options`.
        unknown: nothing else is accepted.

    Returns:
        A callable with the inputs and outputs of ``gm``.

    Raises:
        AlignedKVError: a bad mode or option, or a declined site with ``strict=True``.
    """
    for name, value in unknown.items():
        raise UnknownOptionError(name, value, ("mode", "options"))
    choices = parse(mode, options)
    graph_report = REGISTRY.open(_traced_function(gm))
    _HEAD_START.wait()
    try:
        return _compile_rewritten(gm, example_inputs, choices, graph_report)
    except Exception as error:
        if choices.strict or isinstance(error, torch_private.passes_through_backends()):
            raise
        graph_report.fallback = f"internal error, {type(error).__name__}: {error}"
        graph_report.sites = tuple(_declined(site, graph_report.fallback) for site in graph_report.sites)
        _log.warning("%s: compiled by stock Inductor after an %s", graph_report.name, graph_report.fallback, exc_info=True)
        return torch_private.compile_graph(gm, example_inputs, choices.inductor_patches())
    finally:
        REGISTRY.add(graph_report)


_HEAD_START = install(alignedkv)


def _compile_rewritten(
    gm: torch.fx.GraphModule, example_inputs: Sequence[object], options: Options, graph_report: GraphReport
) -> Callable[..., Sequence[object]]:
    rewritten = passes.rewrite_graph(gm, example_inputs, options=priced(options))
    graph_report.sites = rewritten.sites
    log_sites(graph_report.name, rewritten.sites)
    declined = [site for site in rewritten.sites if site.outcome is Outcome.DECLINED]
    if options.strict and declined:
        links = sorted({site.kind.link for site in declined if site.kind is not None})
        raise DeclinedError([describe_site(site) for site in declined], links)
    patches = options.inductor_patches()
    shares_layers = options.share_layers and not torch_private.freezes_weights(patches)
    outline = passes.outline_layers(rewritten) if shares_layers else None
    if not rewritten.is_changed:
        if outline is None:
            return torch_private.compile_graph(gm, example_inputs, patches)
        return OutlinedGraph(outline, partial(torch_private.compile_region, patches=patches))
    log_rewritten(graph_report.name, rewritten.module)
    lowering.register()
    if rewritten.no_cuda_graphs and options.cuda_graphs:
        patches[torch_private.CUDA_GRAPHS] = False
        graph_report.declined_cuda_graphs = rewritten.no_cuda_graphs
        _log.info("%s: %s", graph_report.name, rewritten.no_cuda_graphs)
    added = post_grad_pass(replace(options, shadow_every=0))
    compiled = (
        torch_private.compile_graph(rewritten.module, rewritten.example_inputs, patches, added)
        if outline is None
        else OutlinedGraph(outline, partial(torch_private.compile_region, patches=patches, post_grad=added))
    )
    return Runtime(compiled, rewritten, options, graph_report)


def _declined(site: SiteReport, reason: str) -> SiteReport:
    return (
        site
        if site.outcome is Outcome.DECLINED
        else replace(site, outcome=Outcome.DECLINED, reason=reason, kind=Reason.INTERNAL_ERROR)
    )


def _traced_function(gm: torch.fx.GraphModule) -> str:
    """Module or function that the first node of the graph stands in, "" when Dynamo did not say."""
    for node in gm.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            path, module = next(iter(stack.values()))
            return getattr(module, "__name__", str(module)).rsplit(".", 1)[-1] or str(path)
    return ""
