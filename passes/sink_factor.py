"""Sinks that a model applies behind its attention, as a factor of the output (Granite with sliding windows).

    softmax(logits) @ value * sigmoid(logsumexp(logits, -1) - sinks)[..., None]

A sink takes its part of the weights, and ``e^lse / (e^lse + e^sink)``, the factor, is what it leaves; so this is
``softmax([logits, sinks])[..., :-1] @ value``, the normal form of :class:`AttentionCall`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch.fx import Node

from .nodes import arguments, fake, operation, same, tensor_of
from .records import AttentionCall
from .softmax import second_reader
from .views import is_cast, is_regrouping


def call_times_factor(node: Node, calls: Mapping[Node, AttentionCall]) -> AttentionCall | None:
    """The attention with sinks that a product of an attention and such a factor is, or None.

    Args:
        calls: the written-out attentions before ``node``, by their nodes.
    """
    if operation(node) != "mul" or len(node.args) != 2 or node.kwargs:
        return None
    for output, factor in (node.args, node.args[::-1]):
        call = calls.get(output) if isinstance(output, Node) else None
        if call is None or call.sinks is not None or call.folded or not isinstance(factor, Node) or tensor_of(factor) is None:
            continue
        chain: list[Node] = []
        sinks = _sinks_of(factor, call, chain)
        if sinks is not None:
            inner = call.inner | {call.node, *chain}
            refusal = second_reader(node, inner)
            return replace(call, node=node, product=call.node, sinks=sinks, inner=inner, refusal=refusal)
    return None


def _sinks_of(factor: Node, call: AttentionCall, chain: list[Node]) -> Node | None:
    """The sinks ``[Hq]`` of a factor ``[B, Hq, Q, 1]``; the nodes on the way are appended to ``chain``."""
    output = fake(call.node)
    if (
        output.dim() != 4
        or fake(factor).dim() != 4
        or not same(fake(factor).shape[3], 1)
        or not _same_sizes(factor, call.node, 3)
    ):
        return None
    sigmoid = _behind_views(factor, chain)
    if operation(sigmoid) != "sigmoid" or fake(sigmoid).dim() != 3 or not _same_sizes(sigmoid, call.node, 3):
        return None
    chain.append(sigmoid)
    difference = _behind_casts(sigmoid.args[0], chain)
    if difference is None or operation(difference) != "sub" or len(difference.args) != 2 or difference.kwargs:
        return None
    chain.append(difference)
    total, shaped_sinks = _behind_casts(difference.args[0], chain), difference.args[1]
    if total is None or operation(total) != "logsumexp" or not isinstance(shaped_sinks, Node):
        return None
    chain.append(total)
    bound = arguments(total, ("input", "dim", "keepdim"))
    softmax = arguments(next(node for node in call.inner if operation(node) == "softmax"), ("input", "dim"))
    if bound.get("input", bound.get("self")) is not softmax.get("input", softmax.get("self")) or bound.get("dim") not in (
        -1,
        output.dim() - 1,
    ):
        return None
    sinks = _behind_views(shaped_sinks, chain)
    shape = fake(shaped_sinks).shape if tensor_of(shaped_sinks) is not None else ()
    fits = len(shape) == 3 and same(shape[0], 1) and same(shape[1], output.shape[1]) and same(shape[2], 1)
    return sinks if fits and tensor_of(sinks) is not None and fake(sinks).dim() == 1 else None


def _same_sizes(left: Node, right: Node, dims: int) -> bool:
    return all(same(fake(left).shape[dim], fake(right).shape[dim]) for dim in range(dims))


def _behind_casts(value: object, chain: list[Node]) -> Node | None:
    """Where a node comes from, floating casts left out."""
    while isinstance(value, Node) and is_cast(value) and fake(value).is_floating_point():
        chain.append(value)
        value = value.args[0]
    return value if isinstance(value, Node) and tensor_of(value) is not None else None


def _is_slicing(node: Node) -> bool:
    """``x[:, :, None]``; what keeps all elements in this way keeps their order."""
    if operation(node) != "getitem":
        return False
    items = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(item is None or item is Ellipsis or isinstance(item, slice) for item in items)


def _behind_views(node: Node, chain: list[Node]) -> Node:
    """Where a node comes from, floating casts and views that keep all elements in order left out."""
    while (is_cast(node) or is_regrouping(node) or _is_slicing(node)) and isinstance(node.args[0], Node):
        source = tensor_of(node.args[0])
        if source is None or not source.is_floating_point() or not same(source.numel(), fake(node).numel()):
            break
        chain.append(node)
        node = node.args[0]
    return node
