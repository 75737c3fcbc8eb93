"""Compile one decode step of a two-layer Llama for a GPU that is not there, and print what Inductor decides about CUDA graphs.

    python tests/backend/fake_gpu_decode.py     # needs benchmarks/ on PYTHONPATH; prints JSON, one entry per variant

Model, cache and inputs are fake CUDA tensors; Dynamo, the passes, AOTAutograd and Inductor's code generation are the real ones,
up to the generated module, which is not loaded. For a process that does nothing else: the stand-in undoes nothing.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from captured_function import function_to_capture
from torch._dynamo.utils import counters
from torch._inductor import compile_fx, config
from torch._inductor.cudagraph_utils import check_for_mutation
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from alignedkv_compile import backend, break_even, passes
from gpu_codegen import DEVICES, stand_in_for_cuda

ROWS, LAYERS, HEADS, DIM = 1024, 2, 2, 64


class _CompiledError(Exception):
    """Ends a variant once its graph is compiled: there is nothing to run it on."""


def _stop(*_: object) -> None:
    raise _CompiledError


def index_without_device_guard(self: torch.Tensor, index: Any) -> torch.Tensor:
    """``tensor[...]`` in operators: on a build without CUDA, the method itself asks for a device guard that is missing."""
    indices = index if isinstance(index, tuple) else (index,)
    taken = sum(one is not None and one is not Ellipsis for one in indices)
    result, dim = torch.ops.aten.alias.default(self), 0
    for one in indices:
        if one is None:
            result, dim = torch.ops.aten.unsqueeze.default(result, dim), dim + 1
        elif one is Ellipsis:
            dim += self.dim() - taken
        elif isinstance(one, slice):
            result, dim = torch.ops.aten.slice.Tensor(result, dim, one.start, one.stop, one.step or 1), dim + 1
        elif isinstance(one, int):
            result = torch.ops.aten.select.int(result, dim, one)
        else:
            raise NotImplementedError(index)
    return result


class Generated:
    """In place of the generated module: its partitions are handed to what would capture them."""

    def __init__(self, lowering: GraphLowering, devices: set[str]) -> None:
        lowering.codegen()
        devices |= set(lowering.device_types)
        self.call = _stop
        self.runner = SimpleNamespace(partitions=[_stop], call=_stop, recursively_apply_fns=self.recursively_apply_fns)
        self.recursively_apply_fns = self.runner.recursively_apply_fns
        self._partitions = len(lowering.partition_maps or ())

    def recursively_apply_fns(self, functions: Iterable[Callable[..., object]]) -> None:
        captures = [function(_stop) for function in functions]
        assert len(captures) == self._partitions


def decisions(name: str, *, marked: bool) -> list[dict[str, Any]]:
    """What Inductor decides about each part of the decode graph that it would capture.

    Args:
        name: of a backend.
        marked: whether transformers marked the cache, as it does where compiled code is not the first to use it.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    found: list[dict[str, Any]] = []
    devices: set[str] = set()

    def record(model: object, static_input_idxs: Sequence[int] = (), **given: Any) -> Callable[..., object]:
        inputs, written = len(given["placeholders"]), given["mutated_input_idxs"]
        function = function_to_capture(_stop, static_input_idxs, given)
        found.append(
            {
                "devices": sorted(devices),
                "written": len(written),
                "written_but_not_static": len(set(written) - set(static_input_idxs)),
                "copied_at_each_replay": inputs - len(set(static_input_idxs)),
                "skipped": check_for_mutation(function, [None] * inputs, lambda tensor: False),
            }
        )
        return _stop

    model_config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=HEADS,
        max_position_embeddings=ROWS,
    )
    torch._dynamo.reset()
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True), torch.no_grad():
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            model = LlamaForCausalLM(model_config).eval().requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        cache = StaticCache(model_config, max_cache_len=ROWS)
        cache.early_initialization(1, HEADS, DIM, torch.bfloat16, torch.device("cuda"))
        if not marked:
            for layer in cache.layers:
                for tensor in (layer.keys, layer.values, layer.cumulative_length):
                    del tensor._dynamo_static_input_type
        token = torch.zeros(1, 1, dtype=torch.int64, device="cuda")
        step = torch.compile(model.forward, backend=name, mode="reduce-overhead")
        with (
            patch.object(GraphLowering, "_compile_to_module", lambda lowering: Generated(lowering, devices)),
            patch.object(compile_fx, "cudagraphify", record),
            patch.object(backend, "Runtime", lambda *_: _stop),
            patch.object(break_even, "least_context", lambda read: 1),  # torch takes no options beside a mode
            contextlib.suppress(_CompiledError),
        ):
            step(input_ids=token, past_key_values=cache, position_ids=token)
    return found


def main() -> None:
    stand_in_for_cuda(DEVICES["sm_90"])
    config.joint_graph_constant_folding = False  # it makes real tensors
    index = torch.Tensor.__getitem__
    torch.Tensor.__getitem__ = lambda self, key: (  # type: ignore[method-assign, assignment]
        index_without_device_guard(self, key) if self.device.type == "cuda" else index(self, key)
    )
    found = {
        f"{name}, {'marked' if marked else 'unmarked'}": decisions(name, marked=marked)
        for name, marked in (("inductor", True), ("inductor", False), ("alignedkv", True), ("alignedkv", False))
    }
    with patch.object(passes, "mark_written_caches", lambda *_: None):
        found["alignedkv without marks, unmarked"] = decisions("alignedkv", marked=False)
    json.dump({"variants": found, "skips": counters["inductor"]["cudagraph_skips"]}, sys.stdout)


if __name__ == "__main__":
    main()
