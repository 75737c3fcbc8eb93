"""Following a cache through views, expands and casts: which chains fold, and into how many repeats."""

# ruff: noqa: ANN001 - fixtures and the functions that Dynamo traces read better bare

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.fx import Graph, Node

from alignedkv_compile.passes.nodes import Declined
from alignedkv_compile.passes.views import Repeats, fold, head_repeats

Chain = Callable[[torch.Tensor], torch.Tensor]


def trace(chain: Chain, shape: tuple[int, ...] = (2, 3, 8, 4), dtype: torch.dtype = torch.bfloat16) -> Node:
    """The chain as Dynamo captures it."""
    captured: list[Graph] = []

    def backend(gm, example_inputs):
        captured.append(gm.graph)
        return gm

    torch.compile(lambda cache: chain(cache).sin(), backend=backend, fullgraph=True)(torch.randn(shape).to(dtype))
    (last,) = (node for node in captured[0].nodes if node.target == "sin")
    return last.args[0]  # type: ignore[return-value]


FOLDED: list[tuple[int, Chain]] = [
    (1, lambda x: x.contiguous()),
    (1, lambda x: x.transpose(1, 2).transpose(1, 2)),
    (1, lambda x: x.permute(0, 2, 1, 3).permute((0, 2, 1, 3))),
    (1, lambda x: x[:, :, :8, ...]),
    (1, lambda x: x.reshape(6, 8, 4).view(2, 3, 8, 4)),
    (1, lambda x: x.to(torch.float32)),
    (1, lambda x: x.float().bfloat16()),
    (1, lambda x: x.unsqueeze(1).squeeze(1).narrow(2, 0, 8)),
    (5, lambda x: x[:, :, None].expand(2, 3, 5, 8, 4).reshape(2, 15, 8, 4)),
    (5, lambda x: x[:, :, None, :, :].expand(-1, -1, 5, -1, -1).flatten(1, 2)),
    (5, lambda x: x.repeat_interleave(5, dim=1)),
    (5, lambda x: torch.repeat_interleave(x, 5, -3).float()),
    (6, lambda x: x.repeat_interleave(2, 1).repeat_interleave(3, 1)),
    (5, lambda x: x.unsqueeze(2).repeat(1, 1, 5, 1, 1).reshape(2, 15, 8, 4)),
]
REFUSED: list[tuple[str, Chain]] = [
    ("repeated in another order", lambda x: x.repeat_interleave(2, 1).repeat(1, 5, 1, 1)),
    ("repeated in another order", lambda x: x.repeat(5, 1, 1, 1)),
    ("another order", lambda x: x.transpose(1, 2)),
    ("another order", lambda x: x.transpose(2, 3)),
    ("another order", lambda x: x.repeat_interleave(2, dim=0)),
    ("another order", lambda x: x.repeat_interleave(2, dim=2)),
    ("across its axes", lambda x: x.reshape(2, 6, 4, 4)),
    ("across its axes", lambda x: x.transpose(1, 2).reshape(2, 3, 8, 4)),
    ("a part of the cache", lambda x: x[:, :, 1:]),
    ("a part of the cache", lambda x: x[:, 0]),
    ("a part of the cache", lambda x: x.narrow(2, 0, 4)),
    ("rounded from bfloat16 to float16", lambda x: x.half()),
    ("indexed by a tensor", lambda x: x[:, :, torch.arange(8)]),
    ("reinterprets its bytes", lambda x: x.view(torch.float16)),
]


TILED: list[tuple[int, Chain]] = [
    (5, lambda x: x.repeat(1, 5, 1, 1)),
    (5, lambda x: x[:, None].expand(2, 5, 3, 8, 4).reshape(2, 15, 8, 4)),
    (6, lambda x: x.repeat(1, 2, 1, 1).repeat(1, 3, 1, 1)),
]


@pytest.mark.parametrize(("tiled", "repeats", "chain"), [*((False, *one) for one in FOLDED), *((True, *one) for one in TILED)])
def test_folded(tiled: bool, repeats: int, chain: Chain) -> None:
    operand = trace(chain)
    folded = fold(operand)
    assert folded.base.op == "placeholder"
    assert head_repeats(folded) == Repeats(repeats, tiled)


@pytest.mark.parametrize(("repeats", "chain"), TILED)
def test_a_tiled_fold_means_what_the_chain_computes(repeats: int, chain: Chain) -> None:
    cache = torch.randn(2, 3, 8, 4)
    assert torch.equal(cache.repeat(1, repeats, 1, 1), chain(cache))


@pytest.mark.parametrize(("repeats", "chain"), FOLDED)
def test_a_fold_means_what_the_chain_computes(repeats: int, chain: Chain) -> None:
    cache = torch.randn(2, 3, 8, 4).to(torch.bfloat16)
    expected = chain(cache)
    assert torch.equal(cache.repeat_interleave(repeats, 1).to(expected.dtype), expected)


@pytest.mark.parametrize(("reason", "chain"), REFUSED)
def test_refused(reason: str, chain: Chain) -> None:
    operand = trace(chain)
    with pytest.raises(Declined, match=reason):
        head_repeats(fold(operand))


def test_one_kv_head_may_be_repeated_in_any_order() -> None:
    operand = trace(lambda x: x.repeat(1, 5, 1, 1), shape=(2, 1, 8, 4))
    assert head_repeats(fold(operand)) == Repeats(5)
