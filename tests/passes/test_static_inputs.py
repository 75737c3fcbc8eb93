"""Marks for CUDA graphs: which inputs of the rewritten graph count as staying where they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx import GraphModule

from alignedkv_compile.options import Options

HEADS, DIM, ROWS = 2, 16, 64
UNMARKED, MARKED = None, "unguarded"


class Layer:
    """A cache that knows nothing of marks."""

    def __init__(self) -> None:
        self.keys = torch.zeros(1, HEADS, ROWS, DIM)
        self.values = torch.zeros(1, HEADS, ROWS, DIM)
        self.length = torch.tensor(0)


def step(query: torch.Tensor, layer: Layer, visits: torch.Tensor) -> torch.Tensor:
    """One token: its keys and values are the query itself."""
    positions = torch.arange(1) + layer.length
    layer.length.add_(1)
    visits.add_(1)
    layer.keys.index_copy_(2, positions, query)
    layer.values.index_copy_(2, positions, query)
    mask = (torch.arange(ROWS) <= positions)[None, None, None]
    return F.scaled_dot_product_attention(query, layer.keys, layer.values, attn_mask=mask)


def marks(module: GraphModule) -> dict[str, str | None]:
    """The mark of each input that is a tensor, by the last part of its name."""
    found = {}
    for node in module.graph.nodes:
        if node.op == "placeholder" and isinstance(node.meta["example_value"], torch.Tensor):
            name = "planes" if "alignedkv" in node.name else node.name.strip("_").rpartition("_")[2]
            found[name] = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
    return found


@pytest.mark.parametrize(
    ("options", "of_the_cache"),
    [
        (Options(min_context=0, mode="reduce-overhead"), MARKED),
        (Options(min_context=0, mode="max-autotune"), MARKED),
        (Options(min_context=0, inductor={"triton.cudagraphs": True}), MARKED),
        (Options(min_context=0), UNMARKED),
        (Options(min_context=0, mode="max-autotune", inductor={"triton.cudagraphs": False}), UNMARKED),
    ],
)
def test_what_is_marked(make_harness: Any, options: Options, of_the_cache: str | None) -> None:
    harness = make_harness(options)
    query, layer, visits = torch.randn(1, HEADS, 1, DIM), Layer(), torch.tensor(0)
    torch.compile(step, backend=harness, fullgraph=True)(query, layer, visits)
    assert layer.length == visits == 1
    expected = {"keys": of_the_cache, "values": of_the_cache, "length": of_the_cache, "planes": MARKED}
    arguments = {"query": UNMARKED, "visits": UNMARKED}  # written, but who knows whether it is the same tensor next time
    assert marks(harness.last.module) == expected | arguments
    assert set(marks(harness.originals[-1]).values()) == {UNMARKED}, "Dynamo's own graph is as it was"


def test_caches_that_are_arguments_are_marked(make_harness: Any) -> None:
    def call(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        layer = Layer.__new__(Layer)
        layer.keys, layer.values, layer.length = keys, values, length
        return step(query, layer, torch.zeros(()))

    harness = make_harness(Options(min_context=0, mode="reduce-overhead"))
    layer = Layer()
    torch.compile(call, backend=harness, fullgraph=True)(torch.randn(1, HEADS, 1, DIM), layer.keys, layer.values, layer.length)
    cache = {"keys": MARKED, "values": MARKED, "planes": MARKED}
    assert marks(harness.last.module) == cache | {"query": UNMARKED, "length": UNMARKED}
