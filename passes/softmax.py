"""Attention that a model writes out, as a product, a softmax and a product, in the normal form of :class:`AttentionCall`.

The nodes between the two products are followed from the last one back to the first, one at a time, and each is either one of
a few steps, in this order, or the attention is not recognised::

    softmax(...)                  casts, dropout that is off, views, [..., :-1] where sinks were added
      x - x.max(-1)               leaves a softmax as it is
      cat([x, sinks], -1)
      x + mask, max(x, least), masked_fill(x, mask, least), where(mask, x, least), x * scale, x / scale
      cap * tanh(x / cap)           outside of no factor
      x * scale, x / scale
    matmul, bmm or baddbmm        of the query and the transposed keys

What a graph computes otherwise is left alone: a step that is not listed means that the attention is not the normal form's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Node

from .nodes import arguments, is_metadata, mutated_by, operation, same, tensor_of
from .records import AttentionCall, MaskTerm
from .views import FOLDED_KEY, FOLDED_VALUE, PLAIN, TRANSPOSED_KEY, is_cast, is_regrouping

SMALLEST_FACTOR = 2.0**-8
"""What a mask or a least value may be multiplied by afterwards and still prohibit; a negative number would turn it round."""
_PRODUCTS = ("matmul", "bmm")
_ADDITIONS = ("add", "iadd", "add_")
_MULTIPLICATIONS = ("mul", "imul", "mul_")
_DIVISIONS = ("truediv", "itruediv", "div", "div_")


@dataclass
class _Walk:
    """What has been met on the way from the softmax back to the scores.

    Attributes:
        inner: nodes met, which only the attention may use.
        masks: what is added to the scores, or prohibits.
        factor: of the scores, as far as it was met; not yet cap or scale.
    """

    inner: list[Node] = field(default_factory=list)
    masks: list[MaskTerm] = field(default_factory=list)
    sinks: Node | None = None
    softcap: float = 0.0
    factor: float = 1.0
    dropped_last: bool = False


def written_out_call(node: Node) -> AttentionCall | None:
    """The attention whose product with V a node is, or None."""
    if operation(node) not in _PRODUCTS or len(node.args) != 2 or not all(isinstance(arg, Node) for arg in node.args):
        return None
    weights, value = node.args
    assert isinstance(weights, Node)
    assert isinstance(value, Node)
    walk = _Walk()
    logits = _behind_softmax(weights, walk)
    scores = None if logits is None else _scores(logits, walk)
    if scores is None or walk.dropped_last != (walk.sinks is not None):
        return None
    query, key, extra = _product(scores)
    if query is None or key is None:
        return None
    if extra is not None and (walk.softcap or walk.factor < SMALLEST_FACTOR):
        return None
    masks = (*walk.masks, *((replace(extra, factor=walk.factor),) if extra is not None else ()))
    folded = operation(scores) != "matmul"
    inner = frozenset((*walk.inner, scores))
    return AttentionCall(
        node=node,
        scores=scores,
        query=query,
        key=key,
        value=value,
        masks=masks,
        dropout=0.0,
        is_causal=False,
        scale=walk.factor * _alpha(scores),
        enable_gqa=False,
        softcap=walk.softcap,
        sinks=walk.sinks,
        folded=folded,
        key_axes=FOLDED_KEY if folded else TRANSPOSED_KEY,
        value_axes=FOLDED_VALUE if operation(node) == "bmm" else PLAIN,
        inner=inner,
        refusal=second_reader(node, inner),
    )


def _behind_softmax(weights: Node, walk: _Walk) -> Node | None:
    """The logits of the softmax that the weights come from."""
    node = weights
    while operation(node) != "softmax":
        walk.inner.append(node)
        if _is_neutral(node) or _is_idle_dropout(node):
            pass
        elif _drops_last(node) and not walk.dropped_last:
            walk.dropped_last = True
        else:
            return None
        if not isinstance(node.args[0], Node):
            return None
        node = node.args[0]
    walk.inner.append(node)
    bound = arguments(node, ("input", "dim"))
    logits = bound.get("input", bound.get("self"))
    tensor = tensor_of(node)
    if tensor is None or bound.get("dim") not in (-1, tensor.dim() - 1) or not isinstance(logits, Node):
        return None
    return logits


def _scores(logits: Node, walk: _Walk) -> Node | None:
    """The product of query and keys that the logits come from."""
    node: Node | None = logits
    steps = (_logit_step, _mask_step, _cap_step, _factor_step)
    while node is not None and operation(node) not in (*_PRODUCTS, "baddbmm"):
        walk.inner.append(node)
        if _is_neutral(node):
            node = _operand_of(node)
        else:
            node = next((found for step in steps if (found := step(node, walk)) is not None), None)
    return node


def _logit_step(node: Node, walk: _Walk) -> Node | None:
    """The largest logit subtracted, and the sinks: the outermost steps."""
    name = operation(node)
    if walk.masks or walk.softcap or walk.factor != 1:
        return None
    if name == "sub" and isinstance(node.args[0], Node) and len(node.args) == 2:
        largest = _largest_of(node.args[0], node.args[1])
        walk.inner.extend(largest)
        return node.args[0] if largest else None
    if name in ("cat", "concat", "concatenate") and walk.sinks is None:
        bound = arguments(node, ("tensors", "dim"))
        parts, dim = bound.get("tensors"), bound.get("dim", 0)
        tensor = tensor_of(node)
        if tensor is None or dim not in (-1, tensor.dim() - 1) or not isinstance(parts, (list, tuple)) or len(parts) != 2:
            return None
        before, sinks = parts
        if not isinstance(sinks, Node) or not isinstance(before, Node):
            return None
        walk.sinks = _per_head(sinks)
        return None if walk.sinks is None else before
    return None


def _per_head(sinks: Node) -> Node | None:
    """``s`` of ``s.reshape(1, -1, 1, 1).expand(...)``, as it is added to logits ``[B, H, Q, T]``."""
    node = sinks
    while operation(node) in ("expand", "expand_as", "to") and isinstance(node.args[0], Node):
        node = node.args[0]
    before, after = tensor_of(node.args[0]) if node.args else None, tensor_of(node)
    if not is_regrouping(node) or before is None or after is None or before.dim() != 1 or after.dim() != 4:
        return None
    fits = all(same(size, wanted) for size, wanted in zip(after.shape, (1, before.shape[0], 1, 1), strict=True))
    return node.args[0] if fits and isinstance(node.args[0], Node) else None


def _mask_step(node: Node, walk: _Walk) -> Node | None:
    """A bias or mask added, or logits replaced by a least value."""
    name, tensor = operation(node), tensor_of(node)
    if tensor is None or walk.softcap or walk.factor < SMALLEST_FACTOR:
        return None
    folded = tensor.dim() == 3
    if name in _ADDITIONS and len(node.args) == 2 and not node.kwargs:
        before, mask = _score_and_other(node)
        bias = tensor_of(mask)
        if before is None or not isinstance(mask, Node) or bias is None or not bias.is_floating_point():
            return None
        walk.masks.append(MaskTerm(mask, folded=folded, factor=walk.factor))
        return before
    parts: tuple[object, ...] = (*node.args, *node.kwargs.values())
    if name in ("max", "maximum") and len(parts) == 2:
        return parts[0] if isinstance(parts[0], Node) and _is_least(parts[1], tensor.dtype) else None
    if name not in ("masked_fill", "masked_fill_", "where") or len(parts) != 3 or not _is_least(parts[2], tensor.dtype):
        return None
    logits, chosen = parts[:2] if name != "where" else (parts[1], parts[0])
    if not isinstance(logits, Node) or not isinstance(chosen, Node):
        return None
    walk.masks.append(MaskTerm(chosen, prohibits=name != "where", folded=folded))
    return logits


def _cap_step(node: Node, walk: _Walk) -> Node | None:
    """``cap * tanh(x / cap)``."""
    cap = _factor(node)
    if cap is None or walk.softcap or walk.factor != 1:
        return None
    inner = _operand_of(node)
    if inner is None or operation(inner) != "tanh" or not isinstance(inner.args[0], Node):
        return None
    divided = inner.args[0]
    inverse, before = _factor(divided), _operand_of(divided)
    if inverse is None or before is None or not cap > 0 or abs(inverse * cap - 1) > 1e-6:
        return None
    walk.inner.extend((inner, divided))
    walk.softcap = cap
    return before


def _factor_step(node: Node, walk: _Walk) -> Node | None:
    factor = _factor(node)
    if factor is None:
        return None
    walk.factor *= factor
    return _operand_of(node)


def _factor(node: Node) -> float | None:
    """The number that a node multiplies a tensor by."""
    name = operation(node)
    if name not in (*_MULTIPLICATIONS, *_DIVISIONS) or len(node.args) != 2 or node.kwargs:
        return None
    numbers = [arg for arg in node.args if isinstance(arg, (int, float)) and not isinstance(arg, bool)]
    if len(numbers) != 1 or (name in _DIVISIONS and numbers[0] is not node.args[1]) or numbers[0] == 0:
        return None
    return 1 / numbers[0] if name in _DIVISIONS else float(numbers[0])


def _operand_of(node: Node) -> Node | None:
    nodes = [arg for arg in node.args if isinstance(arg, Node) and tensor_of(arg) is not None]
    return nodes[0] if nodes else None


def _score_and_other(node: Node) -> tuple[Node | None, object]:
    """Which side of a sum leads to the scores: the one behind which there is a product."""
    left, right = node.args
    for one, other in ((left, right), (right, left)):
        if isinstance(one, Node) and _leads_to_product(one):
            return one, other
    return None, None


def _leads_to_product(node: Node, depth: int = 12) -> bool:
    while depth:
        if operation(node) in (*_PRODUCTS, "baddbmm"):
            return True
        following = [arg for arg in node.args if isinstance(arg, Node) and _same_scores(arg, node)]
        if operation(node) in _ADDITIONS and len(following) == 2:
            return any(_leads_to_product(one, depth - 1) for one in following)
        if not following:
            return False
        node, depth = following[0], depth - 1
    return False


def _same_scores(before: Node, after: Node) -> bool:
    left, right = tensor_of(before), tensor_of(after)
    return left is not None and right is not None and left.is_floating_point() and same(left.numel(), right.numel())


def _largest_of(logits: Node, subtracted: object) -> tuple[Node, ...]:
    """The nodes of ``logits.max(dim=-1, keepdim=True).values`` or ``amax``; none when it is something else."""
    if not isinstance(subtracted, Node):
        return ()
    if operation(subtracted) in ("getitem", "getattr"):
        reduction = subtracted.args[0]
        found = isinstance(reduction, Node) and subtracted.args[1] in (0, "values") and operation(reduction) == "max"
        return (subtracted, reduction) if found and reduction.args[0] is logits else ()  # type: ignore[union-attr, return-value]
    return (subtracted,) if operation(subtracted) == "amax" and subtracted.args[0] is logits else ()


def _is_least(value: object, dtype: torch.dtype) -> bool:
    """A number, or a graph constant, so small that its weight is zero."""
    if isinstance(value, Node):
        constants = [arg for arg in (*value.args, *value.kwargs.values()) if isinstance(arg, float)]
        made = operation(value) in ("full", "tensor", "scalar_tensor", "full_like") and len(constants) == 1
        return made and _is_least(constants[0], dtype)
    return isinstance(value, (int, float)) and value <= torch.finfo(dtype).min / 2


def _is_neutral(node: Node) -> bool:
    """Casts between floating dtypes, and views that keep the last dimension."""
    if not node.args or not isinstance(node.args[0], Node):
        return False
    before, after = tensor_of(node.args[0]), tensor_of(node)
    if before is None or after is None or not before.is_floating_point() or not after.is_floating_point():
        return False
    if is_cast(node):
        return before.device == after.device
    return is_regrouping(node) and before.dim() >= 3 and after.dim() >= 3 and _same_last_two(before, after)


def _same_last_two(before: torch.Tensor, after: torch.Tensor) -> bool:
    return all(same(before.shape[dim], after.shape[dim]) for dim in (-2, -1))


def _is_idle_dropout(node: Node) -> bool:
    if operation(node) != "dropout":
        return False
    bound = arguments(node, ("input", "p", "training"))
    return bound.get("p", 0.5) == 0 or bound.get("training", True) is False


def _drops_last(node: Node) -> bool:
    """``x[..., :-1]``."""
    if operation(node) != "getitem":
        return False
    index, dims = node.args[1], tensor_of(node)
    if not isinstance(index, tuple) or dims is None or index[-1] != slice(None, -1, None):
        return False
    return index[:-1] == (Ellipsis,) or (len(index) == dims.dim() and all(one == slice(None) for one in index[:-1]))


def _product(scores: Node) -> tuple[Node | None, Node | None, MaskTerm | None]:
    """Query, transposed keys, and what ``baddbmm`` adds."""
    names = ("input", "batch1", "batch2") if operation(scores) == "baddbmm" else ("batch1", "batch2")
    bound: dict[str, object] = {"beta": 1, "input": None, **arguments(scores, names)}
    query, key, added, beta = (bound.get(name) for name in ("batch1", "batch2", "input", "beta"))
    if not isinstance(query, Node) or not isinstance(key, Node) or beta not in (0, 1) or math.isnan(_alpha(scores)):
        return None, None, None
    nothing = added is None or beta == 0 or _stays_zero(added)
    return query, key, None if nothing else MaskTerm(added, folded=True)


def _stays_zero(added: object) -> bool:
    """Zeros that nothing but the product uses: somebody else might write to them first."""
    return isinstance(added, Node) and operation(added) == "zeros" and len(added.users) == 1


def _alpha(scores: Node) -> float:
    alpha = scores.kwargs.get("alpha", 1.0) if operation(scores) == "baddbmm" else 1.0
    return float(alpha) if isinstance(alpha, (int, float)) else math.nan


def second_reader(node: Node, inner: frozenset[Node]) -> str:
    """Why the scores or weights cannot go: something else reads or writes them; "" when nothing does."""
    for one in inner:
        for user in one.users:
            if user is not node and user not in inner and not is_metadata(user):
                return f"the attention weights are also read by {operation(user)}"
        if any(written not in inner for written in mutated_by(one)):
            return f"{operation(one)} writes a tensor in place on the way to attention"
    return ""
