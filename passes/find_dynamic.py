"""Attention over a cache that is concatenated anew each step (``DynamicCache``).

    key = cat([past_key, new_key], -2)                      # past: placeholders; key and value: outputs of the graph
    value = cat([past_value, new_value], -2)
    scaled_dot_product_attention(query, key, value, enable_gqa=True)

The rewrite never materialises ``key`` and ``value``, so nothing else may read their data, or the past's. Asking for their sizes
is fine: those are expressions in the symbols that Dynamo passes as inputs.
"""

from __future__ import annotations

from torch.fx import Node

from .attention import check_cache_pair, check_constants, check_mask, check_query, is_long, parse_call
from .facts import GraphFacts
from .nodes import ATTENTION, Declined, arguments, depends_on_data, example, example_size, fake, operation, tensor_of
from .records import AttentionCall, AttentionSite, CacheKind, CacheOperand, Outcome
from .symbols import inputs_by_symbol, is_expressible
from .views import Fold, fold, head_repeats

CROPPED = "sliding-window cache: only a part of the concatenated rows is kept"

METADATA = frozenset(
    [
        "size",
        "numel",
        "nelement",
        "dim",
        "ndimension",
        "element_size",
        "is_floating_point",
        "is_complex",
        "__len__",
        "len",
        "getattr",
        "sym_size",
        "sym_numel",
    ]
)
"""Operations on a tensor that read no data and do not depend on its strides."""
_METADATA_ATTRIBUTES = ("shape", "dtype", "device", "ndim", "is_cuda")


def is_append(node: Node, facts: GraphFacts) -> bool:
    """Whether a node is ``cat([past, new], 2)`` of a 4-D graph input, and the graph returns it."""
    parts = append_parts(node)
    return parts is not None and node in facts.outputs


def append_parts(node: Node) -> tuple[Node, Node] | None:
    """``(past, new)`` of a concatenation of a 4-D graph input with new rows, or None."""
    if operation(node) not in ("cat", "concat", "concatenate"):
        return None
    bound = arguments(node, ("tensors", "dim"))
    tensors, dim = bound.get("tensors"), bound.get("dim", bound.get("axis", 0))
    if not isinstance(tensors, (list, tuple)) or len(tensors) != 2 or dim not in (2, -2):
        return None
    past, new = tensors
    fakes = tensor_of(past), tensor_of(new)
    if any(tensor is None or tensor.dim() != 4 for tensor in fakes) or operation(past) != "placeholder":
        return None
    return past, new


def dynamic_site(call: AttentionCall, key: Fold, value: Fold, index: int, facts: GraphFacts) -> AttentionSite:
    """The record of a call whose K and V are concatenations of a past with new rows.

    Raises:
        Declined: with the reason.
    """
    if not facts.inference_only:
        raise Declined("an input requires grad while grad mode is on: the backend is for inference only")
    key_parts, value_parts = append_parts(key.base), append_parts(value.base)
    assert key_parts is not None
    assert value_parts is not None
    check_cache_pair(key_parts[0], value_parts[0])
    operands = [_operand(folded, *parts) for folded, parts in ((key, key_parts), (value, value_parts))]
    query = check_query(call, key_parts[0], operands[0].repeats)
    rows = fake(query).shape[2]
    if is_long(rows):
        hint = example_size(rows)
        return AttentionSite(
            index, call.node, CacheKind.DYNAMIC, Outcome.PREFILL, query, operands[0], operands[1], None, 0.0, hint
        )
    for operand, name in zip(operands, ("K", "V"), strict=True):
        check_readers(operand, name, facts)
    _check_lengths(operands[0], operands[1])
    if operands[0].repeats != operands[1].repeats:
        raise Declined("K and V heads are repeated differently")
    scale = check_constants(call, key_parts[0])
    mask = check_mask(call, fake(key.base).shape[2])
    return AttentionSite(
        index, call.node, CacheKind.DYNAMIC, Outcome.REWRITTEN, query, operands[0], operands[1], mask, scale, int(rows)
    )


def _operand(folded: Fold, past: Node, new: Node) -> CacheOperand:
    if fake(past).dtype != fake(new).dtype:
        raise Declined("past and new rows have different dtypes")
    return CacheOperand(past, folded.base, new, None, folded.chain, head_repeats(folded))


def _check_lengths(key: CacheOperand, value: CacheOperand) -> None:
    """Past and new rows must be as many in K as in V; Dynamo gives each its own symbol, so a guard says so."""
    for name, left, right in (("past", key.source, value.source), ("new rows", key.new_rows, value.new_rows)):
        sizes = (fake(left).shape[2], fake(right).shape[2])
        if any(map(depends_on_data, sizes)):
            raise Declined(f"the length of the {name} depends on data")
        if not bool(sizes[0] == sizes[1]):
            raise Declined(f"K and V have {name} of different lengths")


def check_readers(operand: CacheOperand, name: str, facts: GraphFacts) -> None:
    """Refuse when anything but attention reads the data of the past or of the concatenation.

    Raises:
        Declined: with the reader.
    """
    past, result = operand.source, operand.write
    others = [other for other in facts.placeholders if other is not past and facts.shares_storage(past, other)]
    if others:
        raise Declined(f"{name}'s past shares its storage with another input ({others[0].name})")
    writers = facts.writers(past) + facts.writers(result)
    if writers:
        raise Declined(f"{name} is also written by {operation(writers[0])}")
    for reader in facts.users(past):
        if reader is not result and not _is_metadata(reader):
            raise Declined(f"{name}'s past is also read by {operation(reader)}")
    attention_readers(operand, name)
    symbols = inputs_by_symbol(facts.placeholders)
    for reader in metadata_readers(operand):
        if not is_expressible(example(reader), symbols):
            raise Declined(f"{operation(reader)} of {name} is no expression of the graph's inputs")
    if not is_expressible(fake(past).shape[2], symbols):
        raise Declined(f"the length of {name}'s past is no input of the graph")


def metadata_readers(operand: CacheOperand) -> tuple[Node, ...]:
    """Users of the past and of the concatenation that only ask for sizes and the like."""
    return tuple(reader for tensor in (operand.source, operand.write) for reader in tensor.users if _is_metadata(reader))


def attention_readers(operand: CacheOperand, name: str) -> tuple[Node, ...]:
    """The attention calls that read a concatenation, directly or through views.

    Raises:
        Declined: something else reads its data.
    """
    found: dict[Node, None] = {}
    pending = [operand.write]
    while pending:
        node = pending.pop()
        for reader in node.users:
            if node is operand.write and (operation(reader) == "output" or _is_metadata(reader)):
                continue
            if operation(reader) == ATTENTION and node not in (parse_call(reader).query, parse_call(reader).mask):
                found[reader] = None
            elif reader.users and reader.args[0] is node and fold(reader).base is operand.write:
                pending.append(reader)
            else:
                culprit = node if operation(reader) == "output" else reader
                raise Declined(f"{name} is also read by {operation(culprit)}")
    return tuple(found)


def _is_metadata(node: Node) -> bool:
    name = operation(node)
    return name in METADATA and (name != "getattr" or node.args[1] in _METADATA_ATTRIBUTES)
