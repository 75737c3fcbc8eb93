"""Every private name of Inductor that ``lowering/`` builds its kernels on; the rest of torch's are in ``torch_private.py``.

Apart from that file because importing this one imports the compiler, which takes a second.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any
from unittest import mock

import sympy
import torch
import torch._inductor.lowering  # first: Inductor's modules import each other in a circle
from torch._inductor import ir as ir
from torch._inductor import select_algorithm
from torch._inductor.codegen.cpp import CppKernel
from torch._inductor.codegen.cpp_template import CppTemplate as CppTemplate
from torch._inductor.codegen.cpp_template_kernel import CppTemplateKernel as CppTemplateKernel
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP as DTYPE_TO_CPP
from torch._inductor.codegen.cpp_utils import cexpr
from torch._inductor.codegen.cpp_utils import cexpr_index as cexpr_index  # C++ text of an index expression
from torch._inductor.codegen.triton import texpr as texpr  # Triton text of one
from torch._inductor.lowering import empty_strided as empty_strided
from torch._inductor.lowering import fallback_handler as fallback_handler  # calls an operator from the compiled graph
from torch._inductor.lowering import register_lowering as register_lowering
from torch._inductor.runtime.hints import DeviceProperties as DeviceProperties  # also of a GPU that is not there
from torch._inductor.select_algorithm import SymbolicGridFn as SymbolicGridFn
from torch._inductor.select_algorithm import TritonTemplateKernel as TritonTemplateKernel
from torch._inductor.utils import Placeholder as Placeholder
from torch._inductor.utils import parallel_num_threads as parallel_num_threads
from torch._inductor.virtualized import V as V
from torch.utils._sympy.functions import FloorDiv as FloorDiv  # sympy's own floor is not simplified as sizes are

_CAN_FREEZE = "always_freeze_layout" in inspect.signature(select_algorithm.TritonTemplate.__init__).parameters
"""Since torch 2.12."""


class TritonTemplate(select_algorithm.TritonTemplate):
    """A template that fixes its inputs' strides when it prints them into a kernel.

    By default Inductor leaves them open, to fall back on an ATen kernel if they change; there is none for these.
    """

    def __init__(self, name: str, grid: Any, source: str) -> None:
        super().__init__(name, grid, source, **({"always_freeze_layout": True} if _CAN_FREEZE else {}))

    def maybe_append_choice(self, choices: list[Any], **options: Any) -> NotImplementedError | None:
        if not _CAN_FREEZE:
            for node in options["input_nodes"]:
                node.freeze_layout()
        return super().maybe_append_choice(choices, **options)


@contextlib.contextmanager
def repaired_bounds_checks() -> Iterator[None]:
    """Within, C++ code checks an index only after it has computed it.

    Up to torch 2.12, the check of an index that a fused kernel also computes with comes before the index: the kernel does not
    compile. A DynamicCache's new row and its rotary embedding share such an index, the length of the cache.
    """
    if torch.__version__ >= (2, 13):  # type: ignore[operator]
        yield
        return
    check_bounds = CppKernel.check_bounds

    def check(self: CppKernel, expr: sympy.Expr, size: sympy.Expr, lower: bool, upper: bool) -> None:
        loads = self.loads
        if self.cse.try_get(cexpr(self.rename_indexing(expr))) is not None:
            self.loads = self.compute  # where the check goes
        try:
            check_bounds(self, expr, size, lower, upper)
        finally:
            self.loads = loads

    with mock.patch.object(CppKernel, "check_bounds", check):
        yield
