"""Functions of our own operators, compiled outside of any graph of the user's: once for each kind of arguments."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from . import lowering, torch_private

Function = Callable[..., tuple[torch.Tensor, ...]]


def post_grad_pass(*extra: object) -> torch_private.PostGradPass:
    """Our pass in Inductor, which keys its caches by our version, the sources of our lowerings, and ``extra``."""
    return torch_private.PostGradPass([_package_version().encode(), lowering.source_hash(), repr(extra).encode()])


def _package_version() -> str:
    try:
        return version("alignedkv-compile")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"


def compile_alone(
    function: Function, args: Sequence[torch.Tensor], dynamic_dims: Sequence[Sequence[int]], *key: object
) -> torch_private.GuardedGraph:
    """Compile a function of our operators, without CUDA graphs: it meets tensors at addresses that change.

    Args:
        function, args, dynamic_dims: as :func:`~alignedkv_compile.torch_private.compile_function` takes them.
        key: what the function's graph does not show, for the key of Inductor's caches.
    """
    lowering.register()
    patches = {torch_private.CUDA_GRAPHS: False}
    return torch_private.compile_function(function, args, dynamic_dims, patches, post_grad_pass(function.__name__, *key))


class OwnKernels:
    """Compiled functions by what they were compiled for; several where sizes make the compiler assume different things."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._compiled: dict[Hashable, list[torch_private.GuardedGraph]] = {}

    def __len__(self) -> int:
        """How many have been compiled."""
        return sum(map(len, self._compiled.values()))

    def get(
        self, signature: Hashable, make: Callable[[], torch_private.GuardedGraph], args: Sequence[torch.Tensor]
    ) -> torch_private.GuardedGraph:
        """The kernel of a signature that takes ``args``; ``make`` compiles one where there is none yet."""
        with self._lock:
            variants = self._compiled.setdefault(signature, [])
            for variant in variants:
                if variant.accepts(args):
                    return variant
            variants.append(make())
            return variants[-1]
