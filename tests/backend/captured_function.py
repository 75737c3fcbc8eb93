"""What Inductor asks about a graph that is to become a CUDA graph, in every torch that is supported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch._inductor import config
from torch._inductor.cudagraph_utils import FunctionID, WrappedFunction


def function_to_capture(
    model: Callable[..., Any], static_input_idxs: Sequence[int], given: Mapping[str, Any], number: int = 0
) -> WrappedFunction:
    """As Inductor makes it of the arguments that its ``cudagraphify`` is given."""
    settings = [field.name for field in fields(WrappedFunction) if field.name.startswith("cudagraph_")]  # since torch 2.15
    return WrappedFunction(
        model,
        tuple(static_input_idxs),
        FunctionID(number),
        given["constants"],
        given["placeholders"],
        given["mutated_input_idxs"],
        **{name: getattr(config.triton, name) for name in settings},
    )
