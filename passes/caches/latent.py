"""Multi-head latent attention (DeepSeek V2 and later): K and V of all heads, expanded from a cache of latents at every step.

The cache holds a latent and a rope key per token, where others hold K and V:

    both = linear(latent, weight).view(B, T, H, Dn + Dv).transpose(1, 2)       # latent [B, 1, T, R], weight [H (Dn + Dv), R]
    nope, value = split(both, [Dn, Dv], -1)
    key = new_empty(B, H, T, Dn + Dr)                                          # or cat((nope, rope.expand(...)), -1)
    key[..., :Dn].copy_(nope)
    key[..., Dn:].copy_(rope.expand(-1, H, -1, -1))                            # rope [B, 1, T, Dr]
    scaled_dot_product_attention(query, key, value, mask, scale=scale)

Products can be taken in another order: ``q_nope . (W_k latent)`` is ``(W_k^T q_nope) . latent``, and the weighted sum of
``W_v latent`` is ``W_v`` times that of the latents. So every head attends to the same rows, ``[latent, rope]`` as K and the
latent as V, and nothing is expanded (the *absorbed* form, https://arxiv.org/abs/2405.04434, section 2.1):

    query' = cat((einsum(q_nope, W_k), q_rope), -1)                            # [B, H, Q, R + Dr]
    output = einsum(aligned_read_attention(query', cat((latent, rope), -1), latent, ...), W_v)

This module finds the expansion and takes the products; :mod:`.latent_static` and :mod:`.latent_dynamic` know the caches.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from alignedkv_compile.break_even import ReadShape
from alignedkv_compile.reasons import Reason
from alignedkv_compile.torch_private import FakeTensor

from ..attention import check_cache_pair, check_head_dim
from ..editor import GraphEditor
from ..facts import GraphFacts
from ..nodes import Declined, arguments, concatenated, constant, fake, operation, same, tensor_of
from ..records import AttentionSite
from ..replace_attention import TensorRead
from ..views import head_repeats
from ..worth import read_shape
from .kind import CandidateCall

UNCERTIFIABLE = (
    "guarantee='worst_case' bounds the error of a read of latents, not that of the attention's output, which is a product"
    " with it"
)

_EXPANSIONS = ("expand", "expand_as", "broadcast_to")


def latent_read_shape(site: AttentionSite, *, fixed_rows: bool) -> ReadShape:
    """What the time of a read of latents and rope keys depends on: every head attends to the same rows."""
    read = read_shape(site, fixed_rows=fixed_rows)
    return dataclasses.replace(read, key_dim=read.key_dim + read.value_dim, value_dim=read.key_dim)


@dataclass(frozen=True)
class Expansion:
    """The nodes that make K and V of latents.

    Attributes:
        latent: ``[B, 1, T, R]``, as it enters the product.
        rope: ``[B, 1, T, Dr]``.
        weight: ``[H (Dn + Dv), R]``.
        heads, nope_dim, value_dim: ``H``, ``Dn``, ``Dv``.
        key, value: the results, ``[B, H, T, Dn + Dr]`` and ``[B, H, T, Dv]``.
        product: the node that reads the latents.
        joins: the nodes that read the rope keys and finish ``key``.
        nodes: all nodes from the product to the results, in graph order.
    """

    latent: Node
    rope: Node
    weight: Node
    heads: int
    nope_dim: int
    value_dim: int
    key: Node
    value: Node
    product: Node
    joins: tuple[Node, ...]
    nodes: tuple[Node, ...]


def latents_behind(rows: Node, facts: GraphFacts) -> tuple[Node, ...]:
    """What an operand of attention is expanded from: latent and rope key of K, the latent of V; nothing of any other node."""
    value = _projection(rows, 1)
    if value is not None:
        return (value.latent,)
    assembly = _assembly(rows, facts)
    key = None if assembly is None else _projection(assembly.nope, 0)
    return () if assembly is None or key is None else (key.latent, assembly.rope)


def expansion(key: Node, value: Node, facts: GraphFacts) -> Expansion:
    """The expansion that K and V come from; :func:`latents_behind` has found latents behind both.

    Raises:
        Declined: they come from two.
    """
    assembly, values = _assembly(key, facts), _projection(value, 1)
    keys = None if assembly is None else _projection(assembly.nope, 0)
    if assembly is None or keys is None or values is None:
        raise Declined(Reason.MIXED_CACHES, "K and V are exchanged, or one of them is no expansion of latents")
    if keys.split is not values.split:
        raise Declined(Reason.MIXED_CACHES, "K and V are expanded from different products of latents")
    nodes = {*keys.nodes, *assembly.nodes, value}
    return Expansion(
        latent=keys.latent,
        rope=assembly.rope,
        weight=keys.weight,
        heads=keys.heads,
        nope_dim=keys.sizes[0],
        value_dim=keys.sizes[1],
        key=key,
        value=value,
        product=keys.nodes[0],
        joins=assembly.joins,
        nodes=tuple(sorted(nodes, key=facts.order.__getitem__)),
    )


def known_expansion(site: AttentionSite, facts: GraphFacts) -> Expansion:
    """The expansion of a site that is known to have one."""
    return expansion(site.key.rows, site.value.rows, facts)


def check_expansion(found: Expansion, candidate: CandidateCall, latent: Node, rope: Node, facts: GraphFacts) -> None:
    """Refuse what the absorbed form does not compute.

    Args:
        latent, rope: the caches, or the pasts that they grow from: ``[B, 1, C, R]`` and ``[B, 1, C, Dr]``.

    Raises:
        Declined: with what stands in the way.
    """
    check_cache_pair(latent, rope)
    if candidate.call.folded:
        raise Declined(Reason.SHAPE, "heads that latents are expanded to are one dimension with the batch")
    if constant(fake(latent).shape[1]) != 1:
        raise Declined(Reason.SHAPE, f"the latents have {fake(latent).shape[1]} heads, not 1")
    check_head_dim(constant(fake(latent).shape[3]) + constant(fake(rope).shape[3]), "latent and rope key together")
    weight = fake(found.weight)
    if type(weight) not in (FakeTensor, torch.Tensor, torch.nn.Parameter) or weight.layout != torch.strided:
        raise Declined(Reason.TENSOR_TYPE, "the latents' projection has a weight that is a tensor subclass or sparse")
    if arguments(found.product, _LINEAR).get("bias") is not None:
        raise Declined(Reason.UNKNOWN_ATTENTION, "the latents' projection has a bias")
    tensors = [weight, *(fake(node) for node in (latent, found.product, found.key)), tensor_of(candidate.call.query)]
    if len({tensor.dtype for tensor in tensors if tensor is not None}) > 1:
        raise Declined(Reason.DTYPE, "latents, their projection and the query have different dtypes")
    if any(head_repeats(folded).count != 1 for folded in (candidate.key, candidate.value)):
        raise Declined(Reason.REARRANGED, "the heads are repeated after the latents were expanded")
    for node, name in ((found.weight, "the projection's weight"), (found.product, "what the latents are expanded to")):
        writers = facts.writers(node)
        if writers:
            raise Declined(Reason.SECOND_WRITER, f"{name} is also written by {operation(writers[0])}")
    if max(facts.order[node] for node in found.joins) > facts.order[candidate.call.scores]:
        raise Declined(Reason.WRITE_ORDER, "attention reads K before it is complete")


def check_private(expansions: Sequence[Expansion], sites: Sequence[AttentionSite], facts: GraphFacts) -> None:
    """Refuse expansions that anything but the attention of these sites reads.

    Raises:
        Declined: with the reader.
    """
    inside = {node for found in expansions for node in found.nodes}
    inside |= {node for site in sites for operand in (site.key, site.value) for node in operand.chain}
    calls = {site.attention for site in sites}
    for node in sorted(inside, key=facts.order.__getitem__):
        for reader in node.users:
            if reader not in inside and facts.attention_over(node, reader) not in calls:
                raise Declined(
                    Reason.SECOND_READER,
                    f"the expanded latents are also read by {operation(node if reader.op == 'output' else reader)}",
                )


def erase_expansions(expansions: Sequence[Expansion], editor: GraphEditor) -> None:
    """Remove what nothing needs any more; the attention over it has been replaced."""
    removable = {node for found in expansions for node in found.nodes}
    while needed := {node for node in removable if _is_needed(node, removable, expansions)}:
        removable -= needed
    for node in [node for node in reversed(editor.graph.nodes) if node in removable]:
        editor.erase(node)


def _is_needed(node: Node, removable: Collection[Node], expansions: Sequence[Expansion]) -> bool:
    """Whether one of a node's readers stays, or, of a node that writes a part of K, K itself."""
    writes = any(node in found.joins and found.key is not node and found.key not in removable for found in expansions)
    return writes or any(reader not in removable for reader in node.users)


def join(latent: Node, rope: Node, editor: GraphEditor) -> Node:
    """Rows ``[B, 1, S, R + Dr]`` that the absorbed query meets."""
    return editor.function(torch.cat, (editor.current(latent), editor.current(rope)), -1)


def absorbed(read: TensorRead, found: Expansion, site: AttentionSite, editor: GraphEditor) -> TensorRead:
    """A read with the products of query and output with the weight around it, in float32.

    Rounded to 16 bits between the products they would be less precise than what they replace, where a row's rounding error
    averages out over the rows.

    Args:
        read: latents and rope keys ``[B, 1, C, R + Dr]`` as K, latents ``[B, 1, C, R]`` as V.
    """
    whole, query = slice(None), _float32(editor.current(site.query), editor)
    weight = editor.method("unflatten", editor.current(found.weight), 0, (found.heads, found.nope_dim + found.value_dim))
    nope = editor.function(operator.getitem, query, (whole, whole, whole, slice(None, found.nope_dim)))
    rope = editor.function(operator.getitem, query, (whole, whole, whole, slice(found.nope_dim, None)))
    key_weight = editor.function(operator.getitem, weight, (whole, slice(None, found.nope_dim)))
    value_weight = editor.function(operator.getitem, weight, (whole, slice(found.nope_dim, None)))
    latent_query = editor.function(torch.einsum, "bhqd,hdr->bhqr", nope, _float32(key_weight, editor))

    def finish(output: Node) -> Node:
        result = editor.function(torch.einsum, "bhqr,hdr->bhqd", output, _float32(value_weight, editor))
        dtype = fake(site.attention).dtype
        return result if fake(result).dtype == dtype else editor.method("to", result, dtype)

    return dataclasses.replace(read, query=editor.function(torch.cat, (latent_query, rope), -1), finish=finish)


def _float32(node: Node, editor: GraphEditor) -> Node:
    return node if fake(node).dtype == torch.float32 else editor.method("float", node)


_LINEAR = ("input", "weight", "bias")


@dataclass(frozen=True)
class _Projection:
    """``linear(latent, weight)``, per head, cut in two: ``split`` yields two ``[B, H, T, size]``."""

    latent: Node
    weight: Node
    heads: int
    sizes: tuple[int, int]
    split: Node
    nodes: tuple[Node, ...]


def _projection(part: Node, position: int) -> _Projection | None:
    """The projection that a node is one part of, the first (0) or the second."""
    split = part.args[0] if operation(part) == "getitem" and len(part.args) == 2 and part.args[1] == position else None
    if not isinstance(split, Node) or operation(split) != "split":
        return None
    bound = arguments(split, ("tensor", "split_size_or_sections", "dim"))
    by_heads, sizes = bound.get("tensor"), bound.get("split_size_or_sections")
    if not isinstance(by_heads, Node) or not isinstance(sizes, (list, tuple)) or bound.get("dim") not in (3, -1):
        return None
    if len(sizes) != 2 or not all(isinstance(size, int) for size in sizes):
        return None
    per_row = _swapped(by_heads)
    product = None if per_row is None else _regrouped(per_row)
    if per_row is None or product is None or operation(product) != "linear":
        return None
    operands = arguments(product, _LINEAR)
    latent, weight = operands.get("input"), operands.get("weight")
    if not isinstance(latent, Node) or not isinstance(weight, Node) or tensor_of(weight) is None:
        return None
    heads = constant(fake(per_row).shape[2])
    return _Projection(latent, weight, heads, (sizes[0], sizes[1]), split, (product, per_row, by_heads, split, part))


def _swapped(node: Node) -> Node | None:
    """``x`` of ``x.transpose(1, 2)``, four-dimensional."""
    if operation(node) not in ("transpose", "swapaxes", "swapdims") or len(node.args) != 3:
        return None
    source, *dims = node.args
    return source if isinstance(source, Node) and fake(source).dim() == 4 and {*dims} in ({1, 2}, {-3, -2}) else None


def _regrouped(node: Node) -> Node | None:
    """``x [B, 1, T, H D]`` of ``x.view(B, T, H, D)``."""
    if operation(node) not in ("view", "reshape") or not isinstance(node.args[0], Node):
        return None
    source, result = tensor_of(node.args[0]), fake(node)
    if source is None or source.dim() != 4 or result.dim() != 4 or source.dtype != result.dtype:
        return None
    kept = same(source.shape[1], 1) and same(source.shape[0], result.shape[0]) and same(source.shape[2], result.shape[1])
    return node.args[0] if kept else None


@dataclass(frozen=True)
class _Assembly:
    """K put together of two parts along its last dimension.

    Attributes:
        nope: ``[B, H, T, Dn]``.
        rope: ``[B, 1, T, Dr]``, before it is expanded over the heads.
        joins: the nodes that read the rope key and write K.
        nodes: all of them.
    """

    nope: Node
    rope: Node
    joins: tuple[Node, ...]
    nodes: tuple[Node, ...]


def _assembly(key: Node, facts: GraphFacts) -> _Assembly | None:
    tensor = tensor_of(key)
    if tensor is None or tensor.dim() != 4:
        return None
    parts = concatenated(key, 3)
    if parts is not None:
        return None if facts.writers(key) else _assembled(key, *parts, (key,), (key,))
    if operation(key) != "new_empty":
        return None
    writers = facts.writers(key)
    targets = [
        writer.args[0] for writer in writers if operation(writer) == "copy_" and len(writer.args) == 2 and not writer.kwargs
    ]
    if len(writers) != 2 or len(targets) != 2 or not all(isinstance(target, Node) for target in targets):
        return None
    ranges = [_last_range(target, key) for target in targets]  # type: ignore[arg-type]
    width = constant(tensor.shape[3])
    ordered = sorted(zip(ranges, writers, strict=True), key=lambda pair: pair[0] or (0, 0))
    (first, first_copy), (second, second_copy) = ordered
    if first is None or second is None or first[0] != 0 or first[1] != second[0] or second[1] != width:
        return None
    nodes = (key, *targets, *writers)
    return _assembled(key, first_copy.args[1], second_copy.args[1], writers, nodes)  # type: ignore[arg-type]


def _last_range(node: Node, source: Node) -> tuple[int, int] | None:
    """``(a, b)`` of ``source[..., a:b]``."""
    if operation(node) != "getitem" or node.args[0] is not source:
        return None
    index: object = node.args[1]
    if not isinstance(index, tuple) or len(index) != 2 or index[0] is not Ellipsis or not isinstance(index[1], slice):
        return None
    if not all(bound is None or isinstance(bound, int) for bound in (index[1].start, index[1].stop)):
        return None
    start, stop, step = index[1].indices(constant(fake(source).shape[3]))
    return (start, stop) if step == 1 else None


def _assembled(
    key: Node, nope: object, wide_rope: object, joins: tuple[Node, ...], nodes: tuple[Node, ...]
) -> _Assembly | None:
    if not isinstance(nope, Node) or not isinstance(wide_rope, Node):
        return None
    expanded = operation(wide_rope) in _EXPANSIONS
    rope = wide_rope.args[0] if expanded else wide_rope
    if not isinstance(rope, Node) or tensor_of(nope) is None or tensor_of(rope) is None:
        return None
    whole, half, shared = (fake(node) for node in (key, nope, rope))
    fits = half.dim() == shared.dim() == 4 and same(shared.shape[1], 1) and same(shared.shape[0], whole.shape[0])
    fits = fits and all(same(half.shape[dim], whole.shape[dim]) for dim in range(3))
    if not fits or not same(half.shape[3] + shared.shape[3], whole.shape[3]):
        return None
    return _Assembly(nope, rope, joins, (*nodes, wide_rope) if expanded else nodes)
