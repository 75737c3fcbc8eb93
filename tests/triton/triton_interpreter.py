"""Run the Triton kernels that Inductor emits on CPU tensors, in Triton's interpreter: no GPU, no driver.

``TRITON_INTERPRET=1`` must be set before triton is imported (``tests/conftest.py`` does it for the test suite). Inside
:func:`interpreted`, ``torch.compile`` sends CPU tensors to Inductor's Triton code generation, and the generated module,
launches included, runs as it is; only the numbers are made by numpy.

What triton 3.9's interpreter gets wrong, lacks or does over and over is repaired here, one function per repair, each with its
test in ``test_triton_interpreter.py``: a repair that a later triton makes unnecessary is found by that test's twin, which
runs without it.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    raise ImportError("set TRITON_INTERPRET=1 before anything imports triton")

import triton
import triton.language as tl
from torch._inductor import config as inductor_config
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.language.extra import libdevice
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle


class NoDriver(DriverBase):
    """Answers what Inductor asks a driver for; the interpreter never launches through it."""

    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def benchmark(function: Callable[[], object], **_: object) -> list[float]:
            function()
            return [1.0, 1.0, 1.0]

        return benchmark

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1)

    def clear_cache(self, cache: object) -> None:
        pass

    def get_device_interface(self) -> object:
        return torch.cpu


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """The interpreter stores bfloat16 as the uint16 of its bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(numbers: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    word = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    rounded = ((word + 0x7FFF + ((word >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded)


def repair_bfloat16_casts(patch: Callable[[type, str, object], None]) -> None:
    """In 3.9, float32 to bfloat16 truncates, subnormal bfloat16 to float32 is off, and integers to and from bfloat16 are
    converted to and from its *bits*."""
    cast, convert = Builder.cast_impl, Builder.create_fp_to_fp

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        before, after = source.dtype.scalar, target.scalar
        if after == tl.bfloat16 and before != tl.bfloat16:
            return Handle(float32_to_bfloat16(source.data.astype(np.float32)), tl.bfloat16)
        if before == tl.bfloat16 and after != tl.bfloat16:
            source = Handle(bfloat16_to_float32(source.data), tl.float32)
            if after == tl.float32:
                return source
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return cast_impl(self, source, target)
        return convert(self, source, target, rounding)

    patch(Builder, "cast_impl", cast_impl)
    patch(Builder, "create_fp_to_fp", create_fp_to_fp)


def repair_bfloat16_dot(patch: Callable[[type, str, object], None]) -> None:
    """``tl.dot`` of bfloat16 tiles multiplies their bits as integers in 3.9."""
    dot = Builder.create_dot

    def as_numbers(tile: Any) -> Any:
        return Handle(bfloat16_to_float32(tile.data), tl.float32) if tile.dtype.scalar == tl.bfloat16 else tile

    def create_dot(self: Any, a: Any, b: Any, start: Any, precision: Any, imprecise: Any) -> Any:
        return dot(self, as_numbers(a), as_numbers(b), start, precision, imprecise)

    patch(Builder, "create_dot", create_dot)


_TO_NUMPY = {tl.int32: np.int32, tl.int64: np.int64, tl.float32: np.float32, tl.float64: np.float64}


def _interpreted_libdevice(function: Callable[..., Any], result: Any = None) -> Callable[..., Any]:
    """A numpy function in place of a device library's; ``result`` is its type where that is not the argument's."""

    def call(*arguments: Any, _semantic: object = None) -> Any:
        shaped = max((a for a in arguments if isinstance(a, tl.tensor)), key=lambda a: a.handle.data.size)
        values = [a.handle.data if isinstance(a, tl.tensor) else a for a in arguments]
        with np.errstate(all="ignore"):
            numbers = np.asarray(function(*values))
        scalar = result or shaped.dtype.scalar
        data = numbers.astype(_TO_NUMPY.get(scalar, shaped.handle.data.dtype))
        return tl.tensor(Handle(data, scalar), tl.block_type(scalar, shaped.type.shape) if shaped.type.is_block() else scalar)

    return call


def _torch_function(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: function(torch.from_numpy(np.ascontiguousarray(x))).numpy()


def provide_libdevice(patch: Callable[[object, str, object], None]) -> None:
    """The interpreter has no device library at all; Inductor calls it for most transcendental functions."""
    same: dict[str, Callable[..., Any]] = {name: getattr(np, name) for name in _NUMPY_NAMES}
    same |= {
        "rsqrt": lambda x: 1 / np.sqrt(x),
        "nearbyint": np.rint,
        "round": lambda x: np.trunc(x + np.copysign(0.5, x)),
        "pow": np.power,
        "atan2": np.arctan2,
        "acos": np.arccos,
        "asin": np.arcsin,
        "atan": np.arctan,
        "erf": _torch_function(torch.special.erf),
        "fma": lambda a, b, c: a.astype(np.float64) * b + c,
        "div_rn": np.divide,
    }
    integer = {"isnan": np.isnan, "isinf": np.isinf, "signbit": np.signbit, "isfinited": np.isfinite, "finitef": np.isfinite}
    for name, function in same.items():
        patch(libdevice, name, _interpreted_libdevice(function))
    for name, function in integer.items():
        patch(libdevice, name, _interpreted_libdevice(function, tl.int32))
    patch(libdevice, "llrint", _interpreted_libdevice(np.rint, tl.int64))


_NUMPY_NAMES = (
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "sin", "cos", "tan", "tanh", "sinh", "cosh"),
    *("floor", "ceil", "trunc", "rint", "abs", "fabs", "fmod", "hypot", "copysign", "nextafter"),
)


def patch_the_language_once(patch: Callable[[object, str, object], None]) -> None:
    """Each call of a device function replaces the functions of the language's modules anew, though they are replaced already.
    Nothing is wrong with that but the time, a third of an aligned read's or more."""
    call = interpreter.InterpretedFunction.__call__

    def call_patched(self: Any, *arguments: Any, **named: Any) -> Any:
        modules = [module for module in (tl, tl.core) if any(one is module for one in self.fn.__globals__.values())]
        if any(tl.core.is_builtin(module.load) for module in modules):
            return call(self, *arguments, **named)
        try:
            return self.rewrite()(*arguments, **named)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    patch(interpreter.InterpretedFunction, "__call__", call_patched)


REPAIRS: tuple[Callable[..., None], ...] = (
    repair_bfloat16_casts,
    repair_bfloat16_dot,
    provide_libdevice,
    patch_the_language_once,
)


@contextlib.contextmanager
def repaired(repairs: tuple[Callable[..., None], ...] = REPAIRS) -> Iterator[None]:
    """The interpreter with ``repairs`` in force."""
    with contextlib.ExitStack() as undo:

        def patch(owner: object, name: str, value: object) -> None:
            missing = object()
            before = getattr(owner, name, missing)
            setattr(owner, name, value)
            undo.callback(delattr, owner, name) if before is missing else undo.callback(setattr, owner, name, before)

        for repair in repairs:
            repair(patch)
        yield


INDUCTOR_CONFIG: dict[str, object] = {
    "cpu_backend": "triton",
    "compile_threads": 1,  # worker processes would have neither the driver nor the repairs
    "fx_graph_cache": False,
    "autotune_local_cache": False,
    "triton.cudagraphs": False,
    "triton.autotune_pointwise": False,
}


@contextlib.contextmanager
def interpreted(**config: object) -> Iterator[None]:
    """Within, ``torch.compile`` of functions of CPU tensors makes Triton code, which is interpreted.

    Args:
        **config: further entries of Inductor's config, with ``__`` for the dots of their names.
    """
    drivers = triton.runtime.driver
    patches = {**INDUCTOR_CONFIG, **{name.replace("__", "."): value for name, value in config.items()}}
    torch._dynamo.reset()
    with repaired(), inductor_config.patch(patches), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's, for NaN and overflow that GPUs pass over silently
        warnings.filterwarnings("ignore", message="Could not find an active CPU backend")
        torch._functorch.config.enable_autograd_cache, cache = False, torch._functorch.config.enable_autograd_cache
        before, drivers._active = drivers._active, NoDriver()  # reset_active() would look for a GPU
        try:
            yield
        finally:
            drivers._active = before
            torch._functorch.config.enable_autograd_cache = cache
            torch._dynamo.reset()
