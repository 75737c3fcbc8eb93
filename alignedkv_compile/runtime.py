"""What Dynamo calls in place of its graph: binds the state of every cache and the statistics, then runs the compiled graph.

This runs for every token, so it does little per layer: one dict look-up and a comparison of versions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from .call_times import CALL_TIMES, TimedGraph
from .contract import CallSettings, Outcome, RewrittenGraph
from .options import Options
from .plane_builder import PLANE_BUILDER
from .report import GraphReport
from .shadow import Shadow
from .state.stores import Stores
from .state.usage import add_source
from .statistics import GraphStatistics
from .torch_private import CompiledGraph

_log = logging.getLogger(__name__)

STORES: Stores = Stores(PLANE_BUILDER)
"""The process's stores."""
add_source(STORES)


class Runtime:
    """A compiled graph and the state that it needs at each call.

    Args:
        compiled: what Inductor made of ``graph.module``.
        graph: the rewritten graph; only its bindings are kept.
        options: the user's.
        report: where run-time notes go.
        stores: the process's, unless a test brings its own.
    """

    def __init__(
        self,
        compiled: CompiledGraph,
        graph: RewrittenGraph,
        options: Options,
        report: GraphReport,
        stores: Stores = STORES,
    ) -> None:
        self._compiled = compiled
        self._kept_inputs = graph.kept_inputs
        self._extra_inputs = len(graph.example_inputs) - len(graph.kept_inputs)
        self._kept_outputs = graph.kept_outputs
        self._outputs = graph.outputs
        self._report = report
        settings = CallSettings(stores, options.assume_exclusive_cache, self._note)
        self._caches = [binding.bind(settings) for binding in graph.caches]
        self._statistics = GraphStatistics(graph, options.tolerance, report.function)
        self._shadow: Shadow | None = None
        if graph.shadow:
            key, certified = self._statistics.key, options.certified
            self._shadow = Shadow(graph.shadow, options.shadow_every, key, report.name, options.tolerance, certified=certified)
        reads = any(site.outcome is Outcome.REWRITTEN for site in graph.sites)
        self._timed = TimedGraph(str(self._statistics.key), "decode" if reads else "prefill")

    def __call__(self, *args: object) -> Sequence[object]:
        """Run the graph on Dynamo's inputs and return Dynamo's outputs."""
        observers = CALL_TIMES.observers
        if not observers:
            return self._run(args)
        started = time.perf_counter()
        outputs = self._run(args)
        seconds = time.perf_counter() - started
        for observe in observers:
            observe(self._timed, seconds)
        return outputs

    def _run(self, args: Sequence[object]) -> Sequence[object]:
        inputs: list[object] = [args[position] for position in self._kept_inputs]
        inputs += [None] * self._extra_inputs
        self._statistics.bind(inputs)
        held = [cache.before_call(args, inputs) for cache in self._caches]
        try:
            results = self._compiled(*inputs)
        except BaseException:
            for cache, one in zip(self._caches, held, strict=True):
                cache.failed(one)
            raise
        check = None
        if self._shadow is not None:
            returned = len(self._kept_outputs)
            results, shadowed = results[:returned], results[returned:]
            check = self._shadow.check(inputs, shadowed)
        outputs: list[object] = [None] * self._outputs
        for position, result in zip(self._kept_outputs, results, strict=True):
            outputs[position] = result
        for cache, one in zip(self._caches, held, strict=True):
            cache.after_call(one, args, outputs)
        if check is not None and self._shadow is not None:
            self._shadow.publish(check)
        return outputs

    def _note(self, text: str) -> None:
        if self._report.note(text):
            _log.info("%s: %s", self._report.name, text)
