"""Reading one node of Dynamo's graph: its fake value, the name of its operation, its arguments, what it mutates.

Dynamo's graph is in torch's own vocabulary, before any decomposition, so an operation has one name whether it was written
as a method (``x.unsqueeze(2)``), a function (``torch.unsqueeze(x, 2)``) or an ATen overload.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

import torch
from torch.fx import Node

from alignedkv_compile.reasons import Reason
from alignedkv_compile.torch_private import (
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    statically_known_true,
    tree_leaves,
    unwrapped,
)

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
_PLAIN_MODULES = ("torch", "_operator", "builtins", "math", "einops")
_INPLACE_OPERATORS = frozenset(
    [
        "setitem",
        "delitem",
        "iadd",
        "isub",
        "imul",
        "imatmul",
        "itruediv",
        "ifloordiv",
        "imod",
        "ipow",
        "ilshift",
        "irshift",
        "iand",
        "ior",
        "ixor",
    ]
)


class Declined(Exception):  # noqa: N818 - control flow inside the finders, never seen by a user
    """A finder's refusal; ``str()`` of it is what the report says was met.

    Attributes:
        reason: the kind.
        caches: whose use is refused, if the finder knows better than what the operands lead back to.
    """

    def __init__(self, reason: Reason, met: str, caches: tuple[Node, ...] = ()) -> None:
        super().__init__(met)
        self.reason = reason
        self.caches = caches


def example(node: Node) -> object:
    """Dynamo's fake value of a node: a fake tensor, a number, a tuple of them, or None."""
    return node.meta.get("example_value")


def tensor_of(node: object) -> torch.Tensor | None:
    """The fake tensor that a node yields, or None when it is no node or yields something else."""
    value = example(node) if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def fake(node: Node) -> torch.Tensor:
    """The fake tensor of a node that is known to yield one."""
    value = example(node)
    assert isinstance(value, torch.Tensor), f"{node.name} has no tensor"
    return value


def tensors_of(node: Node) -> Iterator[torch.Tensor]:
    """Every fake tensor inside a node's value (``chunk`` yields several)."""
    return (leaf for leaf in tree_leaves(example(node)) if isinstance(leaf, torch.Tensor))


def storage_of(tensor: torch.Tensor) -> int | None:
    """Identity of a (fake) tensor's storage; fakes of views share it, also those of overlapping graph inputs."""
    tensor = unwrapped(tensor)
    if tensor.layout != torch.strided or tensor.is_nested:
        return None
    return int(tensor.untyped_storage()._cdata)


def same(left: int | torch.SymInt, right: int | torch.SymInt) -> bool:
    """Whether two sizes are equal for certain, without adding a guard."""
    return bool(statically_known_true(left == right))


def equal(left: int | torch.SymInt, right: int | torch.SymInt) -> bool:
    """Whether two sizes are equal; where that is not certain, a guard says so, but for sizes that depend on data."""
    return same(left, right) if depends_on_data(left) or depends_on_data(right) else bool(left == right)


def example_size(size: object) -> int:
    """The size itself, or the example value behind a symbolic one."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)  # type: ignore[call-overload]


def constant(size: object) -> int:
    """The size as an int, which specialises the graph to it where it was symbolic: head counts and dimensions never vary.

    Raises:
        Declined: the size depends on data.
    """
    if depends_on_data(size):
        raise Declined(Reason.LENGTH, "a head count or head dimension depends on data")
    return int(size)  # type: ignore[call-overload]


def depends_on_data(size: object) -> bool:
    """Whether a size is a symbol that has no example value, so that no guard can decide about it."""
    return isinstance(size, torch.SymInt) and not size.node.has_hint()


def is_symbolic(size: object) -> bool:
    """Whether a size is none that the graph is, or has become, specialised to."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def operation(node: Node) -> str:
    """Plain name of what a node computes; names outside torch and operator are qualified, so that they match nothing."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return node.op
    target = node.target
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        namespace, _, name = _schema_name(target).rpartition("::")
        return name if namespace == "aten" else f"{namespace}::{name}"
    if isinstance(target, HigherOrderOperator):
        return f"higher-order operator {target.name()}"
    name, module = getattr(target, "__name__", str(target)), _module_of(target)
    return name if module.partition(".")[0] in _PLAIN_MODULES else f"{module}.{name}"


def _schema_name(target: OpOverload | OpOverloadPacket) -> str:
    return str(target._schema.name if isinstance(target, OpOverload) else target._qualified_op_name)


def _module_of(target: object) -> str:
    owner = getattr(target, "__objclass__", target)  # torch.Tensor.add_ is a method descriptor without a module
    return str(getattr(owner, "__module__", None) or "")


def arguments(node: Node, names: Sequence[str]) -> dict[str, object]:
    """Positional and keyword arguments of a node, by name."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def is_metadata(node: Node) -> bool:
    """Whether a node asks a tensor for its size or the like."""
    name = operation(node)
    return name in METADATA and (name != "getattr" or node.args[1] in _METADATA_ATTRIBUTES)


def concatenated(node: Node, dim: int) -> tuple[Node, Node] | None:
    """``(x, y)`` of ``cat((x, y), dim)`` of four-dimensional tensors, or None."""
    if operation(node) not in ("cat", "concat", "concatenate"):
        return None
    bound = arguments(node, ("tensors", "dim"))
    parts, along = bound.get("tensors"), bound.get("dim", bound.get("axis", 0))
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or along not in (dim, dim - 4):
        return None
    left, right = parts
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    tensors = tensor_of(left), tensor_of(right)
    return (left, right) if all(tensor is not None and tensor.dim() == 4 for tensor in tensors) else None


def row_slice(node: Node) -> slice | None:
    """``s`` of ``x[:, :, s]`` or ``x[:, :, s, :]``, or None."""
    index, whole = node.args[1] if operation(node) == "getitem" else None, slice(None, None, None)
    if not isinstance(index, tuple) or len(index) not in (3, 4) or not isinstance(index[2], slice):
        return None
    return index[2] if all(index[dim] == whole for dim in range(len(index)) if dim != 2) else None


def mutated_by(node: Node) -> tuple[Node, ...]:
    """The nodes whose tensors this one writes in place, or may write as far as the graph can tell."""
    if node.op == "call_method":
        name = str(node.target)
        return _inputs(node.args[:1]) if (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" else ()
    if node.op == "call_module":
        return tuple(node.all_input_nodes)
    if node.op != "call_function":
        return ()
    target = node.target
    if isinstance(target, OpOverload):
        return _written_by_schema(node, target)
    if isinstance(target, OpOverloadPacket):
        overloads = [getattr(target, name) for name in target.overloads()]
        return tuple(dict.fromkeys(one for overload in overloads for one in _written_by_schema(node, overload)))
    module = _module_of(target).partition(".")[0]
    if isinstance(target, HigherOrderOperator) or module not in _PLAIN_MODULES:
        return tuple(node.all_input_nodes)
    written = _inputs(node.kwargs.get("out"))
    name = getattr(target, "__name__", "")
    if (name.endswith("_") and not name.endswith("__")) or name in _INPLACE_OPERATORS or _is_inplace_call(node):
        written += _inputs(node.args[:1] or tuple(node.kwargs.values())[:1])
    return written


def _inputs(value: object) -> tuple[Node, ...]:
    return tuple(leaf for leaf in tree_leaves(value) if isinstance(leaf, Node))


def _written_by_schema(node: Node, overload: OpOverload) -> tuple[Node, ...]:
    formal = overload._schema.arguments
    bound = arguments(node, [argument.name for argument in formal])
    written = [bound.get(argument.name) for argument in formal if argument.alias_info and argument.alias_info.is_write]
    return _inputs(written)


def _is_inplace_call(node: Node) -> bool:
    """``torch.nn.functional.relu(x, inplace=True)`` and its kin."""
    assert callable(node.target)
    if not _module_of(node.target).startswith("torch.nn.functional"):
        return bool(node.kwargs.get("inplace", False))
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return bool(node.kwargs.get("inplace", False))
    return bool(bound.arguments.get("inplace", False))
