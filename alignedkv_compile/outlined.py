"""A graph whose repeated layers are compiled once: what the passes cut out, and what calls it for each layer.

Dynamo writes every layer of a model out, and Inductor compiles what it is given: thirty layers take it thirty times as long as
one. :mod:`alignedkv_compile.passes.outline` cuts a graph at the layers' borders into *regions*, each of which stands for all
layers that compute the same; here they are compiled and called in the graph's order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch.fx

from .torch_private import CompiledGraph


@dataclass(frozen=True)
class Region:
    """A part of a graph, as a graph of its own.

    Attributes:
        module: returns a tuple of tensors and sizes.
        example_inputs: fakes, in the order of its placeholders.
        others: for each further layer that the code serves, its symbols by those of ``example_inputs``: what the compiler
            assumes of the ones must hold for the others.
    """

    module: torch.fx.GraphModule
    example_inputs: tuple[object, ...]
    others: tuple[Mapping[sympy.Symbol, sympy.Symbol], ...]


@dataclass(frozen=True)
class Rows:
    """A slot that is filled before the first call: ``slots[tensor].narrow(0, first, count)``, which writes to the tensor."""

    tensor: int
    first: int
    count: int


@dataclass(frozen=True)
class RegionCall:
    """One call of a region.

    Attributes:
        region: its number.
        inputs: slots of its arguments.
        outputs: slots that its results go to.
        freed: slots that nothing reads afterwards.
    """

    region: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    freed: tuple[int, ...]


@dataclass(frozen=True)
class Outline:
    """A graph as calls of regions over numbered slots: the graph's inputs first, then rows of inputs, then results.

    Attributes:
        regions: each to be compiled once.
        calls: in the order in which they run.
        inputs: how many inputs the graph has.
        rows: fill the slots behind the inputs, in order.
        slots: how many there are.
        outputs: slots that the graph returns.
    """

    regions: tuple[Region, ...]
    calls: tuple[RegionCall, ...]
    inputs: int
    rows: tuple[Rows, ...]
    slots: int
    outputs: tuple[int, ...]


class OutlinedGraph:
    """The compiled regions of an outline, called as the whole graph would be.

    Args:
        outline: of the graph.
        compile_region: takes a region's attributes.
    """

    def __init__(self, outline: Outline, compile_region: Callable[..., CompiledGraph]) -> None:
        compiled = [compile_region(region.module, region.example_inputs, region.others) for region in outline.regions]
        self._calls = [(compiled[call.region], _getter(call.inputs), call.outputs, call.freed) for call in outline.calls]
        self._rows = outline.rows
        self._spare = [None] * (outline.slots - outline.inputs - len(outline.rows))
        self._outputs = _getter(outline.outputs)

    def __call__(self, *inputs: Any) -> Sequence[object]:
        """Run the graph on its inputs and return its outputs."""
        slots: list[Any] = [
            *inputs,
            *(inputs[rows.tensor].narrow(0, rows.first, rows.count) for rows in self._rows),
            *self._spare,
        ]
        for compiled, arguments, results, freed in self._calls:
            returned = compiled(*arguments(slots))
            for slot, result in zip(results, returned, strict=True):
                slots[slot] = result
            for slot in freed:
                slots[slot] = None
        return self._outputs(slots)


def _getter(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Takes the values at ``places`` out of a sequence."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)
