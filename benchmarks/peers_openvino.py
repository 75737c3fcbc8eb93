"""OpenVINO: scaled_dot_product_attention over a stateful KV cache, in the form that its CPU plugin fuses into one node.

The form is that of models exported for it: ReadValue, Gather by beam, Concat with the step's row, repeated for grouped
queries, scaled_dot_product_attention, Assign. When the plugin does not fuse it, every step would copy the whole cache, so a
graph that still has a concatenation is refused. Each step appends a row to the state, which cannot be taken back without
filling it anew: over a run a state grows by a few rows (at most two in a turn), and the figures are those of the longer cache.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attention_inputs import Shape
from attention_variants import Prepared
from peers_base import Copy, Opening, Peer, PeerRefusalError, require

PACKAGE = "openvino"
STATES = ("key", "value")


@dataclass(frozen=True)
class CachePrecision:
    """What the plugin is told.

    Attributes:
        label: ``KV_CACHE_PRECISION``.
        activation: type of the model's tensors, and ``INFERENCE_PRECISION_HINT``.
        bytes_of_row: of K or V of one head, by head dimension, as the plugin stores them.
    """

    label: str
    activation: str
    bytes_of_number: int
    bytes_of_scales: int = 0

    def bytes_of_row(self, head_dim: int) -> int:
        """Bytes of one head's row of K or of V."""
        return head_dim * self.bytes_of_number + self.bytes_of_scales


PRECISIONS = (
    CachePrecision("bf16", "bf16", 2),
    CachePrecision("f16", "f32", 2),
    # A scale and a zero point, both float32, for each row of each head: the plugin's default group is the whole row.
    CachePrecision("u8", "f32", 1, 8),
)


def openvino_peers(threads: int) -> list[Peer]:
    """A peer for each precision of the cache. u4 is left out: version 2026.4 ends the process in this graph."""
    return [
        Peer(
            f"{PACKAGE} {precision.label}",
            f"scaled_dot_product_attention over a stateful cache, fused by the CPU plugin; {precision.label} cache,"
            f" {precision.activation} query",
            functools.partial(_open, precision, threads),
            PACKAGE,
        )
        for precision in PRECISIONS
    ]


def stateful_model(shape: Shape, activation: str) -> Any:
    """``openvino.Model`` of a decode step: parameters query, key, value ``[1, H, 1, D]`` and beam ``[1]``, one output."""
    ov, op = require("openvino", PACKAGE), require("openvino.opset13", PACKAGE)
    element = getattr(ov.Type, activation)
    row = [1, shape.heads, 1, shape.head_dim]
    query = op.parameter([1, shape.query_heads, 1, shape.head_dim], element, name="query")
    beam = op.parameter([1], ov.Type.i32, name="beam")
    rows, repeated, assignments = [], [], []
    for name in STATES:
        rows.append(op.parameter(row, element, name=name))
        info = ov.op.util.VariableInfo()
        info.data_shape = ov.PartialShape([1, shape.heads, -1, shape.head_dim])
        info.data_type, info.variable_id = element, name
        variable = ov.op.util.Variable(info)
        empty = op.convert(op.constant(np.zeros((1, shape.heads, 0, shape.head_dim), np.float32)), activation)
        past = op.gather(op.read_value(empty, variable), beam, op.constant(np.int32(0)))
        cache = op.concat([past, rows[-1]], 2)
        assignments.append(op.assign(cache, variable))
        repeated.append(_repeat(op, cache, shape))
    output = op.scaled_dot_product_attention(query, *repeated, causal=False)
    return ov.Model(results=[op.result(output)], sinks=assignments, parameters=[query, *rows, beam])


def _repeat(op: Any, cache: Any, shape: Shape) -> Any:
    """K or V once for each query head, in the form that the plugin recognises as grouped queries."""
    if shape.group == 1:
        return cache
    length = op.gather(op.shape_of(cache), op.constant(np.array([2], np.int64)), op.constant(np.int64(0)))
    heads = op.constant(np.array([1, shape.heads, shape.group], np.int64))
    target = op.concat([heads, length, op.constant(np.array([shape.head_dim], np.int64))], 0)
    split = op.unsqueeze(cache, op.constant(np.int32(2)))
    many = op.broadcast(split, target, broadcast_spec="BIDIRECTIONAL")
    return op.reshape(many, op.constant(np.array([0, shape.query_heads, -1, shape.head_dim], np.int64)), special_zero=True)


def _open(precision: CachePrecision, threads: int, shape: Shape, dtype: torch.dtype) -> Opening:
    ov = require("openvino", PACKAGE)
    settings = {
        "INFERENCE_PRECISION_HINT": precision.activation,
        "KV_CACHE_PRECISION": precision.label,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        # Pinned threads would stay so in the other peers' turns.
        "ENABLE_CPU_PINNING": False,
    }
    compiled = ov.Core().compile_model(stateful_model(shape, precision.activation), "CPU", settings)
    layers = {node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()}
    if "ScaledDotProductAttention" not in layers or "Concatenation" in layers:
        raise PeerRefusalError("the CPU plugin did not fuse attention with the cache")
    return functools.partial(_copy, ov, compiled, precision)


def _copy(ov: Any, compiled: Any, precision: CachePrecision, prepared: Prepared) -> Copy:
    layer = prepared.layer
    request = compiled.create_infer_request()
    for state in request.query_state():
        state.state = _tensor(ov, {"key": layer.key, "value": layer.value}[state.name][:, :, :-1], precision)
    step = {"query": layer.query, "key": layer.key[:, :, -1:], "value": layer.value[:, :, -1:]}
    tensors = {name: _tensor(ov, tensor, precision) for name, tensor in step.items()}
    tensors["beam"] = ov.Tensor(np.zeros(1, np.int32))
    for name, tensor in tensors.items():
        request.set_tensor(name, tensor)

    def read() -> torch.Tensor:
        request.infer()
        found = request.get_output_tensor(0)
        if precision.activation == "bf16":
            bits = torch.from_numpy(found.data.view(np.uint16).copy())
            return bits.view(torch.bfloat16).view(layer.query.shape)
        return torch.from_numpy(found.data.copy()).view(layer.query.shape)

    rows = 2 * layer.context * layer.shape.heads
    return Copy(request.infer, read, rows * precision.bytes_of_row(layer.shape.head_dim))


def _tensor(ov: Any, tensor: torch.Tensor, precision: CachePrecision) -> Any:
    """A copy of its own, in the model's type; numpy has no bfloat16, so its bits are copied."""
    if precision.activation != "bf16":
        return ov.Tensor(tensor.float().contiguous().numpy())
    found = ov.Tensor(ov.Type.bf16, list(tensor.shape))
    found.data.view(np.uint16)[...] = tensor.bfloat16().contiguous().view(torch.uint16).numpy()
    return found
