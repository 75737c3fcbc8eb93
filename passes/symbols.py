"""Sizes as expressions over the symbols that Dynamo passes to a graph as inputs.

When a tensor leaves the graph's inputs, a size of it can no longer be asked of it. It is rebuilt from the ``SymInt``
placeholders: ``past.numel()`` of ``[1, 2, s53, 16]`` becomes ``s53 * 32``.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping

import sympy
import torch
from torch.fx import Node

from .nodes import example

Symbols = Mapping[sympy.Symbol, Node]


def inputs_by_symbol(placeholders: Iterable[Node]) -> Symbols:
    """For each symbol the first graph input that is just this symbol."""
    found: dict[sympy.Symbol, Node] = {}
    for node in placeholders:
        value = example(node)
        if isinstance(value, torch.SymInt) and isinstance(value.node.expr, sympy.Symbol):
            found.setdefault(value.node.expr, node)
    return found


def is_expressible(value: object, symbols: Symbols) -> bool:
    """Whether :func:`express` can build a value: a constant, a sum or product over the symbols, or a tuple of those."""
    if isinstance(value, (tuple, list)):
        return all(is_expressible(item, symbols) for item in value)
    if isinstance(value, torch.SymInt):
        return _is_polynomial(value.node.expr, symbols)
    return isinstance(value, (int, torch.dtype, torch.device))


def _is_polynomial(expression: sympy.Expr, symbols: Symbols) -> bool:
    if isinstance(expression, sympy.Symbol):
        return expression in symbols
    if isinstance(expression, sympy.Integer):
        return True
    return isinstance(expression, (sympy.Add, sympy.Mul)) and all(_is_polynomial(part, symbols) for part in expression.args)


def express(value: object, symbols: Symbols, call: Callable[..., Node]) -> object:
    """The value as an argument for graph nodes; ``call(function, left, right)`` inserts the node for one sum or product.

    Args:
        value: what :func:`is_expressible` accepted.
    """
    if isinstance(value, (tuple, list)):
        return tuple(express(item, symbols, call) for item in value)
    if not isinstance(value, torch.SymInt):
        return value
    return _express(value.node.expr, symbols, call)


def _express(expression: sympy.Expr, symbols: Symbols, call: Callable[..., Node]) -> Node | int:
    if isinstance(expression, sympy.Symbol):
        return symbols[expression]
    if isinstance(expression, sympy.Integer):
        return int(expression)
    function = operator.add if isinstance(expression, sympy.Add) else operator.mul
    parts = [_express(part, symbols, call) for part in expression.args]
    return functools.reduce(lambda left, right: call(function, left, right), parts)
