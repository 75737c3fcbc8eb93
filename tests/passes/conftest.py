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
from alignedkv_compile.contract import Outcome, RewrittenGraph
from alignedkv_compile.layout import PLANES_VALID
from alignedkv_compile.options import Options
from alignedkv_compile.passes import rewrite_graph
from alignedkv_compile.report import GraphReport
from alignedkv_compile.runtime import Runtime
from alignedkv_compile.state.stores import Stores

UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def signature(module: GraphModule) -> list[str]:
    return [f"{node.name} {node.op} {node.target} {node.args} {node.kwargs}" for node in module.graph.nodes]


def names(module: GraphModule) -> Counter[str]:
    """How often each operation occurs, by plain name."""
    return Counter(
        str(getattr(node.target, "__name__", node.target)) for node in module.graph.nodes if node.op.startswith("call")
    )


class StalePlanes:
    """Leaves planes stale, so that every bit is read, and makes what lies behind the live rows conspicuous."""

    def rebuild(self, planes: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: int) -> None:
        planes.zero_()
        for tensor in (key, value):
            tensor[:, :, rows:] = torch.nan


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
        self.counters: object = None
        self.bounds: object = None

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

    def run(self, graph: RewrittenGraph, run: Callable[..., Sequence[object]], inputs: Sequence[object]) -> Sequence[object]:
        report = GraphReport("harness")

        def compiled(*arguments: object) -> Sequence[object]:
            assert len(arguments) == len(graph.example_inputs)
            assert all(argument is not None for argument in arguments), "an input is not bound"
            self.counters, self.bounds = (
                None if position is None else arguments[position]
                for position in (graph.statistics.counters_input, graph.statistics.bounds_input)
            )
            return run(*arguments)

        return Runtime(compiled, graph, self.options, report, Stores(StalePlanes()))(*inputs)

    @property
    def last(self) -> RewrittenGraph:
        return self.graphs[-1]

    @property
    def outcomes(self) -> list[Outcome]:
        return [site.outcome for site in self.last.sites]

    @property
    def reasons(self) -> list[str]:
        return [site.reason for site in self.last.sites]


class EagerPlanes:
    """Builds planes by the operator's eager meaning."""

    def rebuild(self, planes: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: int) -> None:
        planes.zero_()
        positions = torch.arange(rows)
        torch.ops.alignedkv.quantize_on_write(planes, key[:, :, :rows], value[:, :, :rows], positions, key.shape[2])
        planes[:8].view(torch.int64).fill_(PLANES_VALID)


class EagerBackend(Harness):
    """The whole backend but for Inductor: state lives from call to call, and planes are read."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.stores = Stores(EagerPlanes())

    def __call__(self, gm: GraphModule, example_inputs: Sequence[object], **_: object) -> Runtime:  # type: ignore[override]
        super().__call__(gm, example_inputs)
        return Runtime(self.last.module, self.last, self.options, GraphReport("eager"), self.stores)


@pytest.fixture
def eager_backend() -> Callable[[float], EagerBackend]:
    return lambda tolerance: EagerBackend(Options(min_context=0, tolerance=tolerance))


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
