"""CUDA graphs on a CPU: what Inductor would capture is "recorded" with its inputs' addresses, and "replayed" with those only.

Inductor hands what it compiled to its own ``cudagraphify``, with the numbers of the inputs that are static and of those that
are written; here another function takes its place. From there on this does as ``torch._inductor.cudagraph_trees`` does: its
``check_for_mutation`` decides whether to capture at all; a first call warms up; a recording belongs to the integers and to the
addresses of the static inputs; a replay copies the other inputs to addresses of the recording's, and its outputs lie where
those of the last replay lay. A replay is the compiled code itself, run on the *recorded* tensors, so that whatever should have
been followed and was not shows as a wrong result.

Not emulated: streams, the memory pool, outputs of one graph as inputs of the next, what may not be captured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from captured_function import function_to_capture
from torch._inductor import compile_fx, config, cudagraph_utils, output_code
from torch._inductor.cudagraph_utils import WrappedFunction, check_for_mutation


class Recording:
    """One captured graph: the tensors that it was recorded with, its own copies of the inputs that are not static."""

    def __init__(self, model: Callable[..., Any], inputs: Sequence[Any], static: set[int]) -> None:
        self.model = model
        self.copied = [i for i, value in enumerate(inputs) if isinstance(value, torch.Tensor) and i not in static]
        self.inputs = [value.clone() if i in self.copied else value for i, value in enumerate(inputs)]
        self.outputs: list[Any] = []

    def replay(self, inputs: Sequence[Any]) -> list[Any]:
        for index in self.copied:
            self.inputs[index].copy_(inputs[index])
        results = self.model(list(self.inputs))
        if not self.outputs:
            self.outputs = [value.clone() if isinstance(value, torch.Tensor) else value for value in results]
        for output, result in zip(self.outputs, results, strict=True):
            if isinstance(output, torch.Tensor):
                output.copy_(result)
        return list(self.outputs)


class CapturedFunction:
    """A compiled graph that is to be captured.

    Attributes:
        skipped: why Inductor does not capture it, or None.
        recordings: by integers and addresses.
        replays: calls that were answered by a recording made before.
    """

    def __init__(self, model: Callable[..., Any], function: WrappedFunction) -> None:
        self.model, self.function = model, function
        self.skipped: str | None = None
        self.recordings: dict[object, Recording] = {}
        self.replays = 0
        self._warm: set[object] = set()

    def __call__(self, inputs: list[Any]) -> Any:
        reason = check_for_mutation(self.function, inputs, lambda tensor: False)
        if reason is not None:
            if self.skipped is None:
                cudagraph_utils.log_cudagraph_skip_and_bump_counter(reason)
            self.skipped = reason
            return self.model(inputs)
        static = self.function.static_input_idxs
        integers = tuple(value for value in inputs if not isinstance(value, torch.Tensor))
        if integers not in self._warm:
            self._warm.add(integers)
            return self.model(inputs)
        key = integers, tuple(inputs[index].data_ptr() for index in static)
        self.replays += key in self.recordings
        if key not in self.recordings:
            self.recordings[key] = Recording(self.model, inputs, set(static))
        return self.recordings[key].replay(inputs)


class EmulatedCudaGraphs:
    """Collects the functions that Inductor wants captured, in the order of compilation."""

    def __init__(self) -> None:
        self.functions: list[CapturedFunction] = []

    def cudagraphify(self, model: Callable[..., Any], static_input_idxs: Sequence[int] = (), **given: Any) -> CapturedFunction:
        function = function_to_capture(model, static_input_idxs, given, len(self.functions))
        self.functions.append(CapturedFunction(model, function))
        return self.functions[-1]


@contextlib.contextmanager
def emulated_cuda_graphs() -> Iterator[EmulatedCudaGraphs]:
    """Within, graphs compiled for the CPU that ask for CUDA graphs get them."""
    graphs = EmulatedCudaGraphs()
    post_compile = output_code.CompiledFxGraph.post_compile

    def on_device_0(self: Any, *args: Any, **kwargs: Any) -> None:
        self.device_idxs = {0}
        post_compile(self, *args, **kwargs)

    with (
        config.patch({"fx_graph_cache": False, "graph_partition": False}),
        torch._functorch.config.patch(enable_autograd_cache=False),
        patch.object(output_code.CompiledFxGraph, "post_compile", on_device_0),
        patch.object(compile_fx, "cudagraphify", graphs.cudagraphify),
        patch.object(cudagraph_utils, "check_lowering_disable_cudagraph", lambda devices: None),  # "cpu device"
    ):
        yield graphs
