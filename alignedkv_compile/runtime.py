"""What Dynamo calls in place of its graph: binds planes, append buffers and statistics, then runs the compiled graph.

This runs for every token, so it does little per layer: one dict look-up and a comparison of versions.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from .append_buffers import APPEND_BUFFERS, AppendBuffer, AppendBuffers, CacheTooLongError
from .options import Options
from .passes.records import RewrittenGraph
from .report import GraphReport
from .sidecar import SIDECARS, RebuildHistory, Sidecar, SidecarStore
from .statistics import GraphStatistics
from .torch_private import CompiledGraph

_log = logging.getLogger(__name__)


class Runtime:
    """A compiled graph and the state that it needs at each call.

    Args:
        compiled: what Inductor made of ``graph.module``.
        graph: the rewritten graph; only its bindings are kept.
        options: the user's.
        report: where run-time notes go.
        sidecars, buffers: the process's stores, unless a test brings its own.
    """

    def __init__(
        self,
        compiled: CompiledGraph,
        graph: RewrittenGraph,
        options: Options,
        report: GraphReport,
        sidecars: SidecarStore = SIDECARS,
        buffers: AppendBuffers = APPEND_BUFFERS,
    ) -> None:
        self._compiled = compiled
        self._kept_inputs = graph.kept_inputs
        self._extra_inputs = len(graph.example_inputs) - len(graph.kept_inputs)
        self._kept_outputs = graph.kept_outputs
        self._outputs = graph.outputs
        self._static = graph.static
        self._append = graph.append
        self._trust_unversioned = options.assume_exclusive_cache
        self._report = report
        self._sidecars = sidecars
        self._buffers = buffers
        self._histories: list[RebuildHistory | None] = [None] * len(graph.static)
        self._statistics = GraphStatistics(graph, options.tolerance)

    def __call__(self, *args: object) -> Sequence[object]:
        """Run the graph on Dynamo's inputs and return Dynamo's outputs."""
        inputs: list[object] = [args[position] for position in self._kept_inputs]
        inputs += [None] * self._extra_inputs
        self._statistics.bind(inputs)
        sidecars = self._bind_planes(args, inputs) if self._static else []
        buffers = self._bind_buffers(args, inputs) if self._append else []
        try:
            results = self._compiled(*inputs)
        except BaseException:
            for sidecar in sidecars:  # some rows may have been written and others not
                sidecar.mark_stale()
            raise
        for binding, sidecar in zip(self._static, sidecars, strict=True):
            sidecar.record(args[binding.key_input], args[binding.value_input])  # type: ignore[arg-type]
        return self._assemble(results, buffers) if buffers else results

    def _bind_planes(self, args: tuple[object, ...], inputs: list[object]) -> list[Sidecar]:
        sidecars = []
        for index, binding in enumerate(self._static):
            sidecar = self._sidecars.before_call(
                args[binding.key_input],  # type: ignore[arg-type]
                args[binding.value_input],  # type: ignore[arg-type]
                self._histories[index],
                trust_unversioned=self._trust_unversioned,
            )
            self._histories[index] = sidecar.history
            if not sidecar.valid and self._report.note(sidecar.history.stale_reason):
                _log.info("%s: %s", self._report.name, sidecar.history.stale_reason)
            inputs[binding.planes_input] = sidecar.planes
            sidecars.append(sidecar)
        return sidecars

    def _bind_buffers(self, args: tuple[object, ...], inputs: list[object]) -> list[AppendBuffer]:
        buffers = []
        for binding in self._append:
            buffer = self._buffers.before_call(
                args[binding.key_input],  # type: ignore[arg-type]
                args[binding.value_input],  # type: ignore[arg-type]
                binding.new_rows,
                with_planes=binding.planes_input is not None,
            )
            if binding.largest_capacity is not None and buffer.capacity > binding.largest_capacity:
                raise CacheTooLongError(buffer.capacity, binding.largest_capacity)
            inputs[binding.key_buffer_input] = buffer.key
            inputs[binding.value_buffer_input] = buffer.value
            if binding.planes_input is not None:
                inputs[binding.planes_input] = buffer.planes
            buffers.append(buffer)
        return buffers

    def _assemble(self, results: Sequence[object], buffers: list[AppendBuffer]) -> list[object]:
        outputs: list[object] = [None] * self._outputs
        for position, result in zip(self._kept_outputs, results, strict=True):
            outputs[position] = result
        for binding, buffer in zip(self._append, buffers, strict=True):
            key_view, value_view = self._buffers.after_call(buffer, binding.new_rows)
            for position in binding.key_outputs:
                outputs[position] = key_view
            for position in binding.value_outputs:
                outputs[position] = value_view
        return outputs
