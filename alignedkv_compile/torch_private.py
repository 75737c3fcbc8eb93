"""Every private name of torch that this package uses, each with the reason why no public one does.

Those that ``lowering/`` builds on are in ``inductor_private.py``. What differs between the releases that ``pyproject.toml``
allows is settled in these two files, by asking for what a release has, not for its number. Imports of the compiler itself
stand inside functions: importing the package must not cost the seconds that Inductor takes to import.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import threading
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import sympy
import torch
import torch.fx
from torch._C import _functorch as functorch  # vmap's wrappers have no storage; what they wrap has
from torch._guards import detect_fake_mode as detect_fake_mode  # side buffers' fakes must live in Dynamo's own mode
from torch._inductor import config as inductor_config  # the entries that `options={"inductor": ...}` may name
from torch._inductor import (
    custom_graph_pass,  # what a slot for passes may hold
    list_mode_options,  # what Inductor itself turns a mode into
)
from torch._inductor.custom_graph_pass import CustomGraphPass  # the only way to add to the key of Inductor's caches
from torch._logging import trace_structured  # TORCH_TRACE has no public writer
from torch._ops import HigherOrderOperator as HigherOrderOperator  # to tell operators with hidden bodies from plain functions
from torch._ops import OpOverload as OpOverload  # schemas say what an operator mutates
from torch._ops import OpOverloadPacket as OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.fx.experimental.symbolic_shapes import statically_known_true as statically_known_true  # compares without guarding
from torch.utils._pytree import tree_leaves as tree_leaves  # the containers that FX's own arguments may be

CompiledGraph = Callable[..., Sequence[object]]
"""What Inductor makes of a graph: called with the graph's inputs, returns its outputs."""


def modes() -> tuple[str, ...]:
    """Names of Inductor's modes."""
    return tuple(list_mode_options())


def mode_patches(mode: str | None) -> dict[str, object]:
    """Entries of Inductor's config that stand for a ``torch.compile`` mode."""
    return dict(list_mode_options(mode)) if mode else {}


def inductor_config_types() -> dict[str, type | None]:
    """Name of every entry of Inductor's config, with its type where ``isinstance`` can check it (else None)."""
    types = {name: inductor_config.get_type(name) for name in inductor_config.get_config_copy()}  # type: ignore[attr-defined]
    return {name: kind if typing.get_origin(kind) is None and isinstance(kind, type) else None for name, kind in types.items()}


class PostGradPass(CustomGraphPass):
    """Our entry in Inductor's ``post_grad_custom_post_pass``; its identity is part of the key of its caches.

    Inductor hashes the graph, its own sources and its config, but not the source of lowerings and templates that another
    package registers: without this, an edited template would go on running its old code.

    The pass itself changes nothing.

    Args:
        parts: bytes to hash (sources of the lowerings, options, versions).
    """

    def __init__(self, parts: Sequence[bytes]) -> None:
        digest = hashlib.sha256()
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)
        self._uuid = digest.digest()

    def uuid(self) -> bytes:
        return self._uuid

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Leaves the graph as it is."""


_InferenceAwarePass: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", None)  # since torch 2.12


class PassSequence(_InferenceAwarePass or CustomGraphPass):  # type: ignore[misc]
    """Several passes for a slot that takes one, as in torch 2.11 and 2.12.

    Args:
        passes: run in this order.
    """

    def __init__(self, *passes: Callable[..., None]) -> None:
        self._passes = passes

    def uuid(self) -> tuple[object, ...] | None:
        """Those of all passes; None, which keeps the graph out of Inductor's caches, if one has none."""
        parts = tuple(one.uuid() if isinstance(one, CustomGraphPass) else None for one in self._passes)
        return parts if all(parts) else None

    def __call__(self, graph: torch.fx.Graph, is_inference: bool = True) -> None:
        for one in self._passes:
            if _InferenceAwarePass is not None and isinstance(one, _InferenceAwarePass):
                one(graph, is_inference)
            else:
                one(graph)


def appended_pass(present: Any, added: CustomGraphPass) -> object:
    """What a slot of Inductor's config for passes must hold for ``added`` to run after what is ``present`` there."""
    if not hasattr(custom_graph_pass, "get_custom_graph_passes"):  # a slot holds one pass or None
        return added if present is None else PassSequence(present, added)
    return [*custom_graph_pass.get_custom_graph_passes(present), added]


def compile_graph(
    module: torch.fx.GraphModule,
    example_inputs: Sequence[object],
    patches: Mapping[str, object],
    post_grad: PostGradPass | None = None,
) -> CompiledGraph:
    """Compile ``module`` with Inductor, as ``torch.compile(backend="inductor")`` does with Dynamo's graph.

    Args:
        module: a graph as Dynamo makes it; Inductor takes ownership.
        example_inputs: fakes, in the order of its placeholders.
        patches: entries of Inductor's config to set while compiling.
        post_grad: appended to ``post_grad_custom_post_pass``, after whatever stands there.
    """
    from torch._inductor.compile_fx import compile_fx  # torch.compile itself would trace through Dynamo again

    from .inductor_private import repaired_bounds_checks

    patches = dict(patches)
    if post_grad is None:
        return compile_fx(module, list(example_inputs), config_patches=patches)  # type: ignore[arg-type, return-value]
    slot = "post_grad_custom_post_pass"
    patches[slot] = appended_pass(patches.get(slot, getattr(inductor_config, slot)), post_grad)
    with repaired_bounds_checks():
        return compile_fx(module, list(example_inputs), config_patches=patches)  # type: ignore[arg-type, return-value]


def compile_region(
    module: torch.fx.GraphModule,
    example_inputs: Sequence[object],
    others: Sequence[Mapping[sympy.Symbol, sympy.Symbol]],
    patches: Mapping[str, object],
    post_grad: PostGradPass | None = None,
) -> CompiledGraph:
    """:func:`compile_graph` for a part of a graph that serves several places.

    Args:
        others: for each further place its symbols by those of ``example_inputs``. What the compiler comes to assume of the
            ones, Dynamo will then guard for the others, too.
    """
    from torch._guards import TracingContext, tracing  # what AOTAutograd leaves in Dynamo's context is about whole graphs

    mode = detect_fake_mode(list(example_inputs))
    shape_env = None if mode is None else mode.shape_env
    known = 0 if shape_env is None else len(shape_env.guards)
    with tracing(TracingContext(mode)):
        compiled = compile_graph(module, example_inputs, patches, post_grad)
    if shape_env is not None:
        for guard in shape_env.guards[known:]:
            for names in others:
                if not shape_env.evaluate_expr(guard.expr.xreplace(names)):
                    raise AssertionError(f"{guard.expr} holds for one layer of several")
    # Dynamo is off while it runs what a backend returned: what turns it off at each call would only take time.
    return getattr(compiled, "_torchdynamo_orig_callable", compiled)


def passes_through_backends() -> tuple[type[BaseException], ...]:
    """Exceptions with which Dynamo steers itself; a backend that swallowed them would break tracing."""
    from torch._dynamo.exc import RestartAnalysis, SkipFrame

    return (RestartAnalysis, SkipFrame)


def compile_lock() -> threading.RLock:
    """The lock under which Dynamo compiles: compiling on our own beside it is not thread-safe."""
    from torch._dynamo.convert_frame import compile_lock

    return compile_lock


def around_compilations(begin: Callable[[], None], end: Callable[[], None]) -> None:
    """Have ``begin`` called when Dynamo starts to compile, and ``end`` when it is done, until ``torch._dynamo.reset()``."""
    from torch._dynamo import on_compile_end, on_compile_start

    on_compile_start(lambda *_: begin())
    on_compile_end(lambda *_: end())


def announced_backend() -> tuple[object, Mapping[str, object]]:
    """For which backend, and with which options, Dynamo is about to compile; to be asked where that is announced.

    Who is called at the start of a compilation gets its number only; the rest is an argument of the function that announces it.
    """
    from torch._dynamo.eval_frame import innermost_backend

    frame: FrameType | None = sys._getframe()
    while frame is not None and "compiler_fn" not in frame.f_code.co_varnames:
        frame = frame.f_back
    if frame is None:
        return None, {}
    backend = innermost_backend(frame.f_locals["compiler_fn"])
    return getattr(backend, "compiler_fn", backend), getattr(backend, "kwargs", {}).get("options") or {}


def sets_cpp(options: Mapping[str, object]) -> bool:
    """Whether a backend's ``options`` change an entry of Inductor's config that says how C++ is compiled."""
    entries = options.get("inductor")
    return isinstance(entries, Mapping) and any(str(name).startswith("cpp") for name in entries)


def has_accelerator() -> bool:
    """Whether what is compiled is likely to be for another device than the CPU."""
    return torch.accelerator.is_available()


def instruction_set_checks() -> list[Callable[[], object]]:
    """What Inductor will ask, and keep, of each instruction set of the processor: whether the compiler builds for it."""
    from torch._inductor.cpu_vec_isa import supported_vec_isa_list, x86_isa_checker

    present = set(x86_isa_checker())  # only these are tried
    return [partial(bool, isa) for isa in supported_vec_isa_list if present.issuperset(str(isa).split())]


@dataclass(frozen=True)
class GuardedGraph:
    """A function compiled for symbolic sizes, and the condition on the sizes under which it holds.

    Attributes:
        compiled: takes the sizes that became symbols, then the arguments.
        symbolic_sizes: (argument, dimension) of each of these sizes.
        guards: a Python expression over the arguments' sizes, or None when it holds for all.
        evaluate: evaluates ``guards`` for a list of arguments.
    """

    compiled: CompiledGraph
    symbolic_sizes: tuple[tuple[int, int], ...]
    guards: str | None
    evaluate: Callable[[str, Sequence[object]], bool]

    def accepts(self, args: Sequence[torch.Tensor]) -> bool:
        """Whether the sizes of ``args`` satisfy what the compiler assumed of them."""
        return self.guards is None or self.evaluate(self.guards, args)

    def __call__(self, *args: torch.Tensor) -> Sequence[object]:
        return self.compiled(*(args[index].shape[dim] for index, dim in self.symbolic_sizes), *args)


def compile_function(
    function: Callable[..., tuple[torch.Tensor, ...]],
    args: Sequence[torch.Tensor],
    dynamic_dims: Sequence[Sequence[int]],
    patches: Mapping[str, object],
    post_grad: PostGradPass,
) -> GuardedGraph:
    """Compile a straight-line function of tensors with Inductor, without Dynamo.

    ``torch.compile`` would do, but not from within a call of another compiled function: the user's ``recompile_limit``, stance
    and ``torch._dynamo.reset()`` would reach in.

    Args:
        function: traced by ``torch.fx.symbolic_trace``; returns a tuple of tensors.
        args: arguments whose dtypes, devices, strides and static sizes the result holds for.
        dynamic_dims: for each argument, the dimensions whose size is symbolic.
        patches: as in :func:`compile_graph`.
        post_grad: as in :func:`compile_graph`.
    """
    from torch._dynamo.source import ConstantSource  # a symbol needs a source, though no guard is installed for it
    from torch._guards import TracingContext, tracing  # without it, the caches know no symbols
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    shape_env = ShapeEnv()
    mode = FakeTensorMode(shape_env=shape_env)
    module = torch.fx.symbolic_trace(function)
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    fakes = []
    for node, arg, dims in zip(placeholders, args, dynamic_dims, strict=True):
        sizes = [DimDynamic.DYNAMIC if dim in dims else DimDynamic.STATIC for dim in range(arg.dim())]
        context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(
            dynamic_sizes=sizes, constraint_sizes=[None] * arg.dim()
        )
        fake = mode.from_tensor(arg, symbolic_context=context, source=ConstantSource(f"alignedkv_{node.name}"))
        fakes.append(fake)
    # The caches check an entry's guards on the graph's SymInt inputs alone, so every symbol must be an input of its own.
    symbolic_sizes = tuple(
        (index, dim)
        for index, dims in enumerate(dynamic_dims)
        for dim in dims
        if isinstance(fakes[index].shape[dim], torch.SymInt)
    )
    sizes_first = [fakes[index].shape[dim] for index, dim in symbolic_sizes]
    with module.graph.inserting_before(placeholders[0]):
        size_nodes = [module.graph.placeholder(f"size_{index}_{dim}") for index, dim in symbolic_sizes]
    inputs: list[object] = [*sizes_first, *fakes]
    for node, example in zip([*size_nodes, *placeholders], inputs, strict=True):
        node.meta["example_value"] = example
        node._dynamo_source = None
    for node in module.graph.nodes:
        node.type = None  # annotations are strings here, which AOTAutogradCache cannot hash
    module.recompile()
    with compile_lock(), torch.no_grad(), tracing(TracingContext(mode)):
        compiled = compile_graph(module, inputs, patches, post_grad)
        guards = shape_env.produce_guards_expression(fakes)
    return GuardedGraph(compiled, symbolic_sizes, guards, shape_env.evaluate_guards_expression)


@contextlib.contextmanager
def normal_tensors() -> Iterator[None]:
    """Make tensors that count versions and may be written anywhere, also inside ``torch.inference_mode()``."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Compute with real tensors of our own, whatever modes the compiler that calls us has on; see :func:`normal_tensors`."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), normal_tensors():
        yield


def cache_folder() -> Path:
    """Where Inductor keeps what it has compiled, now."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def write_trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Add a text to the structured trace (``TORCH_TRACE``), where ``tlparse`` shows it; ``text`` is only called then."""
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)


def mark_static_input(node: torch.fx.Node) -> None:
    """Have CUDA graphs use a placeholder's tensor where it is, instead of copying it, and record anew when it has moved.

    What ``torch._dynamo.mark_static_address(tensor)`` comes to in Dynamo's graph. The other kind, "guarded", would have Dynamo
    guard on the address and compile again for each new one.
    """
    node.meta["tensor_dict"] = {**node.meta.get("tensor_dict", {}), "_dynamo_static_input_type": "unguarded"}


def mark_static_address(tensor: torch.Tensor) -> None:
    """Have CUDA graphs use a tensor where it is, as :func:`mark_static_input` does in a graph that is made already."""
    import torch._dynamo  # a second of imports, which whoever compiles has behind them

    torch._dynamo.mark_static_address(tensor)


def is_attribute(node: torch.fx.Node) -> bool:
    """Whether Dynamo found a placeholder's tensor as an attribute of an object, and not as an argument of the call."""
    from torch._dynamo.source import AttrSource  # where Dynamo read an input from

    source = getattr(node, "_dynamo_source", None)
    while source is not None and not isinstance(source, AttrSource):
        source = getattr(source, "base", None)
    return source is not None


CUDA_GRAPHS = "triton.cudagraphs"
"""The entry of Inductor's config that ``mode="reduce-overhead"`` sets."""


def asks_for_cuda_graphs(patches: Mapping[str, object]) -> bool:
    """Whether Inductor captures what it compiles under ``patches``, as far as devices and graphs allow."""
    return bool(patches.get(CUDA_GRAPHS, inductor_config.triton.cudagraphs))


def freezes_weights(patches: Mapping[str, object]) -> bool:
    """Whether Inductor is asked to compile weights in as constants."""
    return bool(patches.get("freezing", inductor_config.freezing))


TRITON_DEVICES = ("cuda", "xpu")
"""Device types for which Inductor generates Triton; torch calls ROCm devices ``cuda`` too."""


def generates_triton(device: torch.device) -> bool:
    """Whether Inductor makes Triton for this device; for CPU tensors only where its ``cpu_backend`` says so, as tests do."""
    return device.type in TRITON_DEVICES or (device.type == "cpu" and inductor_config.cpu_backend == "triton")


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor inside the wrappers of ``vmap`` and other transforms of functions, or the tensor itself."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def defining_size(size: torch.SymInt) -> torch.SymInt:
    """The size as an input that defines the symbol which it is known to equal, where that is another than it was made with.

    Dynamo need not pass a symbol that a tensor's dimension defines, only what equals it; the tensor may be gone from a graph.
    """
    symbol = size.node.expr
    if size.node._expr == symbol or not isinstance(symbol, sympy.Symbol):
        return size
    return size.node.shape_env.create_symintnode(symbol, hint=size.node.hint)


def placeholder_symbol(size: torch.SymInt) -> sympy.Symbol | None:
    """The symbol that Inductor defines where a size is a graph's input: the one that it was made with, though it may equal
    another by now."""
    expression = size.node._expr
    return expression if isinstance(expression, sympy.Symbol) else None


def fresh_size(mode: FakeTensorMode, example: int, name: str, largest: int | None = None) -> torch.SymInt:
    """A new symbol for the size of a graph input, backed by ``example``, and at most ``largest``.

    An unbacked symbol would not do: Inductor takes the sizes of its inputs from example values.
    """
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext, StrictMinMaxConstraint
    from torch.utils._sympy.value_ranges import ValueRanges

    bound = None if largest is None else StrictMinMaxConstraint(vr=ValueRanges(2, largest), warn_only=False)
    context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(
        dynamic_sizes=[DimDynamic.DYNAMIC], constraint_sizes=[bound]
    )
    return mode.from_tensor(torch.empty(example), symbolic_context=context, source=ConstantSource(name)).shape[0]  # type: ignore[return-value]
