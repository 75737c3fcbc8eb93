"""Attention calls in their normal form, and whether the aligned read computes them, whatever cache they read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.fx import Graph, Node

from alignedkv_compile.contract import Outcome
from alignedkv_compile.layout import MAX_HEAD_DIM
from alignedkv_compile.reasons import Reason
from alignedkv_compile.storage import DTYPES
from alignedkv_compile.torch_private import FakeTensor, generates_triton

from .nodes import Declined, arguments, constant, depends_on_data, example_size, fake, is_symbolic, operation, same, tensor_of
from .records import MAX_ALIGNED_QUERY_ROWS, AttentionCall, AttentionSite, CacheOperand, MaskTerm
from .sink_factor import call_times_factor
from .softmax import written_out_call

if TYPE_CHECKING:
    from .caches.kind import CacheKind

_SUPPORTED = "supported are bfloat16, float16 and float32"
_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def attention_calls(graph: Graph) -> tuple[AttentionCall, ...]:
    """Every softmax attention of a graph, over a cache or not, in graph order."""
    calls: dict[Node, AttentionCall] = {}
    for node in graph.nodes:
        call = _fused_call(node) or written_out_call(node) or call_times_factor(node, calls)
        if call is not None:
            calls = {other: found for other, found in calls.items() if other not in call.inner}
            calls[node] = call
    return tuple(calls.values())


def _fused_call(node: Node) -> AttentionCall | None:
    """A ``scaled_dot_product_attention`` node, defaults filled in."""
    if operation(node) != "scaled_dot_product_attention":
        return None
    bound = arguments(node, _PARAMETERS)
    return AttentionCall(
        node=node,
        scores=node,
        query=bound.get("query"),
        key=bound.get("key"),
        value=bound.get("value"),
        masks=() if bound.get("attn_mask") is None else (MaskTerm(bound["attn_mask"]),),
        dropout=bound.get("dropout_p", 0.0),
        is_causal=bound.get("is_causal", False),
        scale=bound.get("scale"),
        enable_gqa=bound.get("enable_gqa", False),
    )


def site_over(call: AttentionCall, kind: CacheKind, index: int, key: CacheOperand, value: CacheOperand) -> AttentionSite:
    """The record of a call over two cache operands that fit together.

    Raises:
        Declined: it is not what the aligned read computes.
    """
    query = check_query(call, key, value)
    rows = fake(query).shape[-2]
    if is_prefill(call):
        return AttentionSite(index, call, kind, Outcome.PREFILL, query, key, value, (), 0.0, example_size(rows))
    scale = check_constants(call, key.rows)
    heads = constant(fake(key.rows).shape[1]) * key.repeats.count if call.folded else fake(query).shape[1]
    check_sinks(call, heads)
    for term in call.masks:
        check_mask(term, (fake(key.source).shape[0], heads, rows, fake(key.rows).shape[2]))
    return AttentionSite(index, call, kind, Outcome.REWRITTEN, query, key, value, call.masks, scale, int(rows))


def check_cache_tensor(node: Node, name: str) -> None:
    """Refuse a cache tensor that the operators cannot hold planes for.

    Raises:
        Declined: with what is wrong with it.
    """
    tensor = fake(node)
    if type(tensor) not in (FakeTensor, torch.Tensor, torch.nn.Parameter):
        raise Declined(Reason.TENSOR_TYPE, f"{name} is a tensor subclass ({type(tensor).__name__})")
    if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided:
        raise Declined(Reason.TENSOR_TYPE, f"{name} is sparse, nested or quantized")
    if tensor.device.type != "cpu" and not generates_triton(tensor.device):
        raise Declined(Reason.DEVICE, f"no lowering for device {tensor.device.type} yet")
    if tensor.dim() != 4:
        raise Declined(Reason.SHAPE, f"{name} has {tensor.dim()} dimensions, not 4")
    if tensor.dtype not in DTYPES.values():
        raise Declined(Reason.DTYPE, f"{name} is {_name(tensor.dtype)}; {_SUPPORTED}")
    check_head_dim(constant(tensor.shape[3]), name)


def check_head_dim(size: int, name: str) -> None:
    """Refuse rows that are too long for the operators.

    Raises:
        Declined: naming the size.
    """
    if not 1 <= size <= MAX_HEAD_DIM:
        raise Declined(Reason.SHAPE, f"head dimension {size} of {name} is not from 1 to {MAX_HEAD_DIM}")


def check_cache_pair(key: Node, value: Node) -> None:
    """Refuse two cache tensors that are no K and V of one layer.

    Raises:
        Declined: with what differs.
    """
    check_cache_tensor(key, "K")
    check_cache_tensor(value, "V")
    key_fake, value_fake = fake(key), fake(value)
    if key is value:
        raise Declined(Reason.MEMORY, "K and V are the same tensor")
    if key_fake.dtype != value_fake.dtype:
        raise Declined(Reason.DTYPE, f"K is {key_fake.dtype}, V is {value_fake.dtype}".replace("torch.", ""))
    if constant(key_fake.shape[1]) != constant(value_fake.shape[1]):
        raise Declined(Reason.SHAPE, f"K has {key_fake.shape[1]} heads, V has {value_fake.shape[1]}")
    if not _equal(key_fake.shape[0], value_fake.shape[0]):
        raise Declined(Reason.SHAPE, "K and V have different batch sizes")


def check_certifiable(site: AttentionSite) -> None:
    """Refuse a site whose output no certified read can vouch for.

    Raises:
        Declined: no certified read is generated for the cache's device, or the read is only a part of the attention.
    """
    if site.kind.uncertifiable:
        raise Declined(Reason.GUARANTEE, site.kind.uncertifiable, (site.key.source, site.value.source))
    device = fake(site.key.source).device
    if generates_triton(device):
        raise Declined(Reason.GUARANTEE, f"guarantee='worst_case' has generated C++ only; this cache is on {device}")


def check_query(call: AttentionCall, key: CacheOperand, value: CacheOperand) -> Node:
    """The query node, once its shape is known to fit the cache.

    Raises:
        Declined: the query is no ``[B, Hq, Q, Dk]``, or ``[B * Hq, Q, Dk]`` where the call folds them, for this cache, with
            ``Hq`` a multiple of its heads.
    """
    query, cache = tensor_of(call.query), fake(key.rows)
    if query is None or not isinstance(call.query, Node) or query.dim() != (3 if call.folded else 4):
        raise Declined(Reason.SHAPE, "the query is not a 4-D tensor")
    cache_heads = constant(cache.shape[1])
    if call.folded:
        if not _equal(query.shape[0], cache.shape[0] * cache_heads * key.repeats.count):
            raise Declined(Reason.SHAPE, "the query has another batch size or number of heads than its keys")
    else:
        heads = constant(query.shape[1])
        if heads % cache_heads:
            raise Declined(Reason.SHAPE, f"{heads} query heads are no multiple of {cache_heads} KV heads")
        if heads != cache_heads * key.repeats.count and not call.enable_gqa and cache_heads * key.repeats.count != 1:
            raise Declined(
                Reason.SHAPE, f"{heads} query heads read {cache_heads * key.repeats.count} KV heads without enable_gqa"
            )
        if not _equal(query.shape[0], cache.shape[0]):
            raise Declined(Reason.SHAPE, "query and cache have different batch sizes")
    if key.repeats != value.repeats:
        raise Declined(Reason.SHAPE, "K and V heads are repeated differently")
    if not _equal(query.shape[-1], cache.shape[3]):
        raise Declined(Reason.SHAPE, "query and K have different head dimensions")
    if query.dtype not in DTYPES.values():
        raise Declined(Reason.DTYPE, f"the query is {_name(query.dtype)}; {_SUPPORTED}")
    return call.query


def check_constants(call: AttentionCall, key: Node) -> float:
    """The scale, once dropout and causality are known to be off.

    Raises:
        Declined: ``dropout_p > 0``, ``is_causal``, or one of the arguments is not a constant.
    """
    if isinstance(call.dropout, bool) or not isinstance(call.dropout, (int, float)) or call.dropout > 0:
        raise Declined(Reason.ARGUMENTS, "dropout_p is above 0")
    if call.is_causal is not False:
        raise Declined(Reason.ARGUMENTS, "is_causal=True over a cache (its mask is aligned to the first row, not to the last)")
    if not isinstance(call.enable_gqa, bool):
        raise Declined(Reason.ARGUMENTS, "enable_gqa is not a constant")
    if call.scale is None:
        return 1.0 / math.sqrt(constant(fake(key).shape[3]))
    if isinstance(call.scale, bool) or not isinstance(call.scale, (int, float)):
        raise Declined(Reason.ARGUMENTS, "the scale is not a constant")
    return float(call.scale)


def check_mask(term: MaskTerm, target: tuple[int | torch.SymInt, ...]) -> None:
    """Refuse a mask that does not broadcast to ``target``, ``[B, Hq, Q, rows]``.

    Raises:
        Declined: it has another dtype, rank or shape.
    """
    mask = tensor_of(term.node)
    if mask is None:
        raise Declined(Reason.MASK, "the mask is not a tensor")
    if type(mask) not in (FakeTensor, torch.Tensor, torch.nn.Parameter) or mask.layout != torch.strided or mask.is_nested:
        raise Declined(Reason.TENSOR_TYPE, "the mask is a tensor subclass, sparse or nested")
    if mask.dtype != torch.bool and (term.prohibits or not mask.is_floating_point()):
        raise Declined(Reason.MASK, f"the mask is {_name(mask.dtype)}, neither bool nor floating")
    if mask.dim() > (3 if term.folded else 4):
        raise Declined(Reason.MASK, f"the mask has {mask.dim()} dimensions")
    sizes = (target[0] * target[1], *target[2:]) if term.folded else target
    for size, wanted in zip(reversed(mask.shape), reversed(sizes), strict=False):
        if not same(size, 1) and not _equal(size, wanted):
            raise Declined(Reason.MASK, f"the mask {tuple(mask.shape)} does not broadcast to {tuple(sizes)}")


def check_sinks(call: AttentionCall, heads: int | torch.SymInt) -> None:
    """Refuse sinks that are not one logit per query head.

    Raises:
        Declined: they have another shape or are not floating.
    """
    if call.sinks is None:
        return
    sinks = fake(call.sinks)
    if sinks.dim() != 1 or not same(sinks.shape[0], heads) or not sinks.is_floating_point():
        raise Declined(Reason.SHAPE, f"the sinks {tuple(sinks.shape)} are not one number for each of {heads} query heads")


def is_prefill(call: AttentionCall) -> bool:
    """Whether a call's query is longer than the aligned read takes, or its length varies.

    Kernels are generated for a number of query rows. Where Dynamo has found that it varies (the questions of a chat, an
    assistant's candidates), a graph for each would take longer to compile than it ever saves.

    Raises:
        Declined: the length depends on data, or there is no such query.
    """
    query = tensor_of(call.query)
    if query is None or query.dim() != (3 if call.folded else 4):
        raise Declined(Reason.SHAPE, "the query is not a 4-D tensor")
    if depends_on_data(query.shape[-2]):
        raise Declined(Reason.LENGTH, "the query length depends on data")
    return is_symbolic(query.shape[-2]) or bool(query.shape[-2] > MAX_ALIGNED_QUERY_ROWS)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _equal(left: int | torch.SymInt, right: int | torch.SymInt) -> bool:
    """Equality by guard where both sides have an example value: sizes of different inputs are different symbols to Dynamo."""
    if depends_on_data(left) or depends_on_data(right):
        return same(left, right)
    return bool(left == right)
