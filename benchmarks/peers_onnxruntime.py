"""ONNX Runtime's com.microsoft.GroupQueryAttention as a model of one node.

Past and present are bound to the same buffers, as its documentation asks for: the step's row of K and V is written in place
(and quantized, where the cache is), and nothing else is copied. Quantized caches have one scale for each tensor, or for each
channel of each head, made from the layer's own largest magnitudes; a deployment would calibrate them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attention_inputs import Shape
from attention_variants import Prepared
from peers_base import Copy, Opening, Peer, require

PACKAGE = "onnxruntime"
OPSET, IR_VERSION = 21, 10


@dataclass(frozen=True)
class CacheType:
    """How GroupQueryAttention stores K and V.

    Attributes:
        label: in the row's name.
        activation: ONNX type of the query, of the step's rows and of the output.
        element: ONNX type of the cache.
        scales: ``k_quant_type`` and ``v_quant_type``: "NONE", "PER_TENSOR" or "PER_CHANNEL".
        bits: of a quantized number.
    """

    label: str
    activation: str
    element: str
    scales: str = "NONE"
    bits: int = 8

    @property
    def quantized(self) -> bool:
        return self.scales != "NONE"


CACHE_TYPES = (
    CacheType("fp32", "FLOAT", "FLOAT"),
    CacheType("fp16", "FLOAT16", "FLOAT16"),
    CacheType("bf16", "BFLOAT16", "BFLOAT16"),
    CacheType("int8 by tensor", "FLOAT", "INT8", "PER_TENSOR"),
    CacheType("int8 by channel", "FLOAT", "INT8", "PER_CHANNEL"),
    CacheType("int4 by channel", "FLOAT", "UINT8", "PER_CHANNEL", 4),
)
_NUMPY = {"FLOAT": np.float32, "FLOAT16": np.float16}


def onnxruntime_peers(threads: int) -> list[Peer]:
    """A peer for each way to store the cache; those that the installed CPU kernel lacks refuse when they are opened."""
    return [
        Peer(
            f"{PACKAGE} {cache.label}",
            f"com.microsoft.GroupQueryAttention, CPU provider, IOBinding, past and present share a buffer; {cache.label} cache,"
            f" {cache.activation.lower()} query",
            functools.partial(_open, cache, threads),
            PACKAGE,
        )
        for cache in CACHE_TYPES
    ]


def one_node_model(shape: Shape, cache: CacheType) -> bytes:
    """The serialized model: a step of one sequence over a cache of any length."""
    onnx = require("onnx", "onnx")
    helper, types = onnx.helper, onnx.TensorProto
    activation, element = getattr(types, cache.activation), getattr(types, cache.element)
    query_width, width = shape.query_heads * shape.head_dim, shape.heads * shape.head_dim
    rows = [1, shape.heads, "rows", shape.head_dim * cache.bits // 8 if cache.quantized else shape.head_dim]
    inputs = {
        "query": (activation, [1, 1, query_width]),
        "key": (activation, [1, 1, width]),
        "value": (activation, [1, 1, width]),
        "past_key": (element, rows),
        "past_value": (element, rows),
        "seqlens_k": (types.INT32, [1]),
        "total_sequence_length": (types.INT32, [1]),
    }
    attributes: dict[str, Any] = {"num_heads": shape.query_heads, "kv_num_heads": shape.heads}
    names = list(inputs)
    if cache.quantized:
        scale_shape = [1, shape.heads, 1, shape.head_dim] if cache.scales == "PER_CHANNEL" else [1]
        inputs |= {"k_scale": (types.FLOAT, scale_shape), "v_scale": (types.FLOAT, scale_shape)}
        attributes |= {"k_quant_type": cache.scales, "v_quant_type": cache.scales, "kv_cache_bit_width": cache.bits}
        # Between them: cos_cache, sin_cache, position_ids, attention_bias and head_sink.
        names += ["", "", "", "", "", "k_scale", "v_scale"]
    outputs = {
        "output": (activation, [1, 1, query_width]),
        "present_key": (element, rows),
        "present_value": (element, rows),
    }
    node = helper.make_node("GroupQueryAttention", names, list(outputs), domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node],
        "decode_step",
        [helper.make_tensor_value_info(name, *found) for name, found in inputs.items()],
        [helper.make_tensor_value_info(name, *found) for name, found in outputs.items()],
    )
    domains = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    found: bytes = helper.make_model(graph, opset_imports=domains, ir_version=IR_VERSION).SerializeToString()
    return found


def quantize(rows: np.ndarray, cache: CacheType) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric numbers and scales.

    Args:
        rows: float32 ``[1, H, C, D]``.
        cache: a quantized type.

    Returns:
        int8 ``[1, H, C, D]``, or uint8 ``[1, H, C, D / 2]`` with two numbers plus 8 in a byte, the even one in the low bits;
        and float32 scales, ``[1]`` or ``[1, H, 1, D]``.
    """
    largest = 2 ** (cache.bits - 1) - 1
    axes = (0, 2) if cache.scales == "PER_CHANNEL" else None
    scales = (np.abs(rows).max(axis=axes, keepdims=True) / largest).astype(np.float32)
    numbers = np.rint(rows / np.where(scales > 0, scales, 1.0)).clip(-largest - 1, largest)
    if cache.scales != "PER_CHANNEL":
        scales = scales.reshape(1)
    if cache.bits == 8:
        return numbers.astype(np.int8), scales
    shifted = (numbers + 8).astype(np.uint8)
    return np.ascontiguousarray(shifted[..., 0::2] | shifted[..., 1::2] << 4), scales


def _open(cache: CacheType, threads: int, shape: Shape, dtype: torch.dtype) -> Opening:
    runtime = require("onnxruntime", PACKAGE)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(one_node_model(shape, cache), options, providers=["CPUExecutionProvider"])
    return functools.partial(_copy, cache, runtime, session)


def _copy(cache: CacheType, runtime: Any, session: Any, prepared: Prepared) -> Copy:
    layer, activation = prepared.layer, _NUMPY[cache.activation]
    key, value = layer.key.float().numpy(), layer.value.float().numpy()
    feeds = {
        "query": layer.query.float().numpy().reshape(1, 1, -1).astype(activation),
        "key": key[:, :, -1].reshape(1, 1, -1).astype(activation),
        "value": value[:, :, -1].reshape(1, 1, -1).astype(activation),
        "seqlens_k": np.array([layer.context - 1], np.int32),
        "total_sequence_length": np.array([layer.context], np.int32),
    }
    if cache.quantized:
        feeds["past_key"], feeds["k_scale"] = quantize(key, cache)
        feeds["past_value"], feeds["v_scale"] = quantize(value, cache)
    else:
        feeds["past_key"], feeds["past_value"] = key.astype(activation), value.astype(activation)
    # The step's own row is in none of them yet: the operator has to write it.
    feeds["past_key"][:, :, -1] = feeds["past_value"][:, :, -1] = 0
    values = {name: runtime.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    output = runtime.OrtValue.ortvalue_from_shape_and_type(feeds["query"].shape, activation, "cpu")
    binding = session.io_binding()
    for name, bound in values.items():
        binding.bind_ortvalue_input(name, bound)
    binding.bind_ortvalue_output("output", output)
    binding.bind_ortvalue_output("present_key", values["past_key"])
    binding.bind_ortvalue_output("present_value", values["past_value"])

    def read() -> torch.Tensor:
        session.run_with_iobinding(binding)
        return torch.from_numpy(output.numpy().copy()).view(layer.query.shape)

    nbytes = feeds["past_key"].nbytes + feeds["past_value"].nbytes
    return Copy(functools.partial(session.run_with_iobinding, binding), read, nbytes)
