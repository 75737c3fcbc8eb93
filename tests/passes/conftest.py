"""A stand-in for the runtime: what the passes return is run with buffers that hold what the contract says they hold."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from torch.fx import GraphModule

import alignedkv_compile.ops
import alignedkv_compile.reference  # noqa: F401 - registers the operators' eager meaning
from alignedkv_compile.layout import arena_layout
from alignedkv_compile.options import Options
from alignedkv_compile.passes import rewrite_graph
from alignedkv_compile.passes.records import Outcome, RewrittenGraph

UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def signature(module: GraphModule) -> list[str]:
    return [f"{node.name} {node.op} {node.target} {node.args} {node.kwargs}" for node in module.graph.nodes]


def names(module: GraphModule) -> Counter[str]:
    """How often each operation occurs, by plain name."""
    return Counter(
        str(getattr(node.target, "__name__", node.target)) for node in module.graph.nodes if node.op.startswith("call")
    )


class Harness:
    """A Dynamo backend that rewrites each graph and runs the result, eagerly or through Inductor.

    Attributes:
        graphs: what the passes returned, one entry per graph.
        originals: the graphs that Dynamo captured.
    """

    def __init__(self, options: Options, *, inductor: bool = False) -> None:
        self.options = options
        self.inductor = inductor
        self.graphs: list[RewrittenGraph] = []
        self.originals: list[GraphModule] = []
        self.counters: torch.Tensor | None = None
        self.bounds: torch.Tensor | None = None
        self.planes: list[torch.Tensor] = []

    def __call__(self, gm: GraphModule, example_inputs: Sequence[object], **_: object) -> Callable[..., list[object]]:
        before = signature(gm)
        rewritten = rewrite_graph(gm, example_inputs, options=self.options)
        assert signature(gm) == before, "Dynamo's own graph was changed"
        self.graphs.append(rewritten)
        self.originals.append(gm)
        run: Callable[..., Sequence[object]] = rewritten.module
        if self.inductor:
            from torch._inductor.compile_fx import compile_fx

            run = compile_fx(rewritten.module, list(rewritten.example_inputs))  # type: ignore[assignment, arg-type]
        return lambda *inputs: self.run(rewritten, run, inputs)

    def run(self, graph: RewrittenGraph, run: Callable[..., Sequence[object]], inputs: Sequence[object]) -> list[object]:
        arguments: dict[int, object] = {number: inputs[position] for number, position in enumerate(graph.kept_inputs)}
        self.planes = []
        for binding in graph.static:
            arguments[binding.planes_input] = self._planes(inputs[binding.key_input], inputs[binding.value_input])
        results: list[object] = [None] * graph.outputs
        for append in graph.append:
            for past, number, outputs in (
                (inputs[append.key_input], append.key_buffer_input, append.key_outputs),
                (inputs[append.value_input], append.value_buffer_input, append.value_outputs),
            ):
                assert isinstance(past, torch.Tensor)
                batch, heads, length, dim = past.shape
                buffer = torch.full((batch, heads, length + append.new_rows + 37, dim), torch.nan, dtype=past.dtype)
                buffer[:, :, :length] = past
                arguments[number] = buffer
                for output in outputs:
                    results[output] = buffer.narrow(2, 0, length + append.new_rows)
            if append.planes_input is not None:
                arguments[append.planes_input] = self._planes(
                    arguments[append.key_buffer_input], arguments[append.value_buffer_input]
                )
        self.counters = self._record(graph, graph.statistics.counters_input, arguments)
        self.bounds = self._record(graph, graph.statistics.bounds_input, arguments)
        assert sorted(arguments) == list(range(len(graph.example_inputs))), "an input is bound twice or not at all"
        for position, value in zip(graph.kept_outputs, run(*(arguments[number] for number in sorted(arguments))), strict=True):
            results[position] = value
        return results

    @staticmethod
    def _record(graph: RewrittenGraph, position: int | None, arguments: dict[int, object]) -> torch.Tensor | None:
        if position is None:
            return None
        example = graph.example_inputs[position]
        assert isinstance(example, torch.Tensor)
        arguments[position] = tensor = torch.zeros(tuple(map(int, example.shape)), dtype=example.dtype)
        return tensor

    def _planes(self, key: object, value: object) -> torch.Tensor:
        assert isinstance(key, torch.Tensor)
        assert isinstance(value, torch.Tensor)
        self.planes.append(torch.zeros(arena_layout(key, value).total, dtype=torch.uint8))
        return self.planes[-1]

    @property
    def last(self) -> RewrittenGraph:
        return self.graphs[-1]

    @property
    def outcomes(self) -> list[Outcome]:
        return [site.outcome for site in self.last.sites]

    @property
    def reasons(self) -> list[str]:
        return [site.reason for site in self.last.sites]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture
def harness() -> Harness:
    return Harness(Options(min_context=0))


@pytest.fixture
def make_harness() -> type[Harness]:
    return Harness


@pytest.fixture
def operations() -> Callable[[GraphModule], Counter[str]]:
    return names


@pytest.fixture
def same_as_stock() -> Callable[..., object]:
    """Call a function and its compiled form on equal inputs; outputs and mutated inputs must agree.

    The budget is a few roundings of the output's dtype: the planes in the harness are stale, so every bit is read, and only the
    order of summation differs.
    """

    def check(function: Callable[..., object], harness: Harness, *inputs: object, dynamic: bool | None = None) -> object:
        stock_inputs = copy.deepcopy(inputs)
        expected = function(*stock_inputs)
        actual = torch.compile(function, backend=harness, fullgraph=True, dynamic=dynamic)(*inputs)
        leaves = torch.utils._pytree.tree_leaves
        pairs = list(zip(leaves((actual, inputs)), leaves((expected, stock_inputs)), strict=True))
        for left, right in pairs:
            if isinstance(left, torch.Tensor) and left.is_floating_point():
                budget = 8 * UNIT_ROUNDOFF[right.dtype] * max([1.0, *right.abs().flatten().tolist()])
                torch.testing.assert_close(left, right, rtol=0, atol=budget)
            elif isinstance(left, torch.Tensor):
                assert torch.equal(left, right)
            else:
                assert left == right
        return actual

    return check
