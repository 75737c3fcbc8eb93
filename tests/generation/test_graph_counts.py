"""How many graphs a conversation takes: as many as stock, or fewer, since each is seconds of compilation for a user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

pytest.importorskip("transformers")
from transformers import DynamicCache, StaticCache
from twins import ALIGNED, EVERY_BIT, Rewriting, compiled, generate, llama, prompt, slow


class Counting:
    """A stock backend that counts: Dynamo's graphs run as they are."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []

    def __call__(self, gm: GraphModule, example_inputs: Sequence[object], **_: object) -> Callable[..., Any]:
        self.graphs.append(gm)
        return gm.forward


def talk(model: Any, cache: Any, rows: Sequence[int]) -> torch.Tensor:
    """Each turn adds a question of so many tokens, and four of an answer."""
    tokens = torch.empty(1, 0, dtype=torch.int64)
    for turn, count in enumerate(rows):
        tokens = torch.cat([tokens, prompt(count, batch=1, seed=turn)], 1)
        turn_inputs = {"input_ids": tokens, "past_key_values": cache, "max_new_tokens": 4, "disable_compile": True}
        tokens = generate(model, **turn_inputs).sequences
    return tokens


SHORT, LONG = (9, 3, 5, 2, 7, 4), (20, 30, 25, 40, 22, 35)
"""Tokens of the questions: those of up to 16 are aligned reads, longer ones prefill."""


def counted(backend: Any, kind: str, rows: Sequence[int]) -> tuple[int, torch.Tensor]:
    """Graphs that a talk takes, and what was said."""
    torch._dynamo.reset()
    model = compiled(llama(), backend)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=256)
    with torch._dynamo.config.patch(recompile_limit=64, accumulated_recompile_limit=512):
        tokens = talk(model, cache, rows)
    return len(backend.graphs), tokens


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        pytest.param("dynamic", LONG, id="long-dynamic", marks=slow),
        pytest.param("static", LONG, id="long-static", marks=slow),
        pytest.param("dynamic", SHORT, id="short-dynamic"),
        pytest.param("static", SHORT, id="short-static", marks=slow),
    ],
)
def test_a_chat_takes_no_more_graphs_than_with_stock(kind: str, rows: Sequence[int]) -> None:
    backend = Rewriting()
    # the last of the long talk is one of two tokens 0.03 apart, between which fewer bits may decide
    backend.selected = ALIGNED if rows is SHORT else EVERY_BIT
    ours, said = counted(backend, kind, rows)
    stock, expected = counted(Counting(), kind, rows)
    assert torch.equal(said, expected)
    assert backend.rewritten
    assert ours <= stock
