"""Every reason for leaving a cached attention call alone, each with the smallest graph that has it."""

# ruff: noqa: ANN001 - fixtures and the functions that Dynamo traces read better bare

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from alignedkv_compile.contract import Outcome

ROWS, DIM = 32, 16
attend = F.scaled_dot_product_attention


def tensors(rows: int = 1, dim: int = DIM, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    def new(heads: int, count: int) -> torch.Tensor:
        return torch.randn(1, heads, count, dim).to(dtype)

    caches = {"K": new(2, ROWS), "V": new(2, ROWS)}
    return {"q": new(2, rows), "k": new(2, rows), "v": new(2, rows), **caches, "at": torch.arange(5, 5 + rows)}


def write(t: dict[str, torch.Tensor]) -> None:
    t["K"].index_copy_(2, t["at"], t["k"])
    t["V"].index_copy_(2, t["at"], t["v"])


def after_write(body: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[dict[str, torch.Tensor]], object]:
    def layer(t: dict[str, torch.Tensor]) -> object:
        write(t)
        return body(t)

    return layer


def different_positions(t):
    t["K"].index_copy_(2, t["at"], t["k"])
    t["V"].index_copy_(2, t["at"] + 1, t["v"])
    return attend(t["q"], t["K"], t["V"])


def only_key_written(t):
    t["K"].index_copy_(2, t["at"], t["k"])
    return attend(t["q"], t["K"], t["V"])


def key_written_twice(t):
    t["K"].index_copy_(2, t["at"], t["k"])
    write(t)
    return attend(t["q"], t["K"], t["V"])


def also_added_to(t):
    write(t)
    t["K"][:, :, 0].add_(1)
    return attend(t["q"], t["K"], t["V"])


def also_assigned(t):
    write(t)
    t["V"][:, :, 3] = 0
    return attend(t["q"], t["K"], t["V"])


def also_written_by_out(t):
    write(t)
    torch.mul(t["K"].clone(), 2, out=t["K"])
    return attend(t["q"], t["K"], t["V"])


def written_after(t):
    out = attend(t["q"], t["K"], t["V"])
    write(t)
    return out


def read_between(t):
    t["K"].index_copy_(2, t["at"], t["k"])
    out = attend(t["q"], t["K"], t["V"])
    t["V"].index_copy_(2, t["at"], t["v"])
    return out


def stale_copy(t):
    key = t["K"].clone()
    write(t)
    return attend(t["q"], key, t["V"])


def two_values(t):
    write(t)
    first = attend(t["q"], t["K"], t["V"])
    return first + attend(t["q"], t["V"], t["K"])


def copied_over(t):
    write(t)
    t["K"].copy_(t["K"] * 2)
    return attend(t["q"], t["K"], t["V"])


def repeated_in_blocks(t):
    write(t)
    return attend(t["q"].repeat(1, 4, 1, 1), *(t[name].repeat_interleave(2, 1).repeat(1, 2, 1, 1) for name in "KV"))


def written_on_dim_3(t):
    t["K"].index_copy_(3, torch.arange(DIM), t["K"] * 2)
    t["V"].index_copy_(2, t["at"], t["v"])
    return attend(t["q"], t["K"], t["V"])


def sigmoid_attention(t):
    write(t)
    return (t["q"] @ t["K"].transpose(2, 3)).sigmoid() @ t["V"]


CASES: list[tuple[str, Callable[[dict[str, torch.Tensor]], object]]] = [
    ("is_causal=True", after_write(lambda t: attend(t["q"], t["K"], t["V"], is_causal=True))),
    ("dropout_p is above 0", after_write(lambda t: attend(t["q"], t["K"], t["V"], dropout_p=1e-9))),
    (
        "rounded from float32 to bfloat16",
        after_write(lambda t: attend(t["q"].bfloat16(), t["K"].bfloat16(), t["V"].bfloat16())),
    ),
    ("the query is float64", after_write(lambda t: attend(t["q"].double(), t["K"].double(), t["V"].double()))),
    ("attention reads a part of the cache", after_write(lambda t: attend(t["q"], t["K"][:, :, 1:], t["V"][:, :, 1:]))),
    ("getitem, which is not folded", after_write(lambda t: attend(t["q"], t["K"], t["V"].chunk(2, 1)[0].repeat(1, 2, 1, 1)))),
    (
        "another order than",
        after_write(lambda t: attend(t["q"].transpose(1, 2), t["K"].transpose(1, 2), t["V"].transpose(1, 2))),
    ),
    ("or one of them from none", after_write(lambda t: attend(t["q"], t["K"], t["V"] * 2))),
    ("K and V are the same tensor", after_write(lambda t: attend(t["q"], t["K"], t["K"]))),
    ("repeated in another order", repeated_in_blocks),
    ("K and V are written at different positions", different_positions),
    ("K and V come from different kinds of cache", only_key_written),
    ("K is written 2 times and V 1 times", key_written_twice),
    ("K is also written by add_", also_added_to),
    ("V is also written by setitem", also_assigned),
    ("K is also written by mul", also_written_by_out),
    ("K is also written by index_copy_", written_on_dim_3),
    ("the cache is written after the attention reads it", written_after),
    ("between the writes of K and of V", read_between),
    ("a copy of the cache that was made before the write", stale_copy),
    ("paired with two different V caches", two_values),
    ("K is also written by copy_", copied_over),
    ("cache read by matmul, which is no known form of attention", sigmoid_attention),
    ("no attention of this graph reads the cache", after_write(lambda t: t["q"] + 1)),
]


@pytest.mark.parametrize(("reason", "layer"), CASES, ids=[reason for reason, _ in CASES])
def test_reason(harness, same_as_stock, operations, reason: str, layer: Callable[..., object]) -> None:
    if "dropout" in reason:
        torch.compile(layer, backend=harness, fullgraph=True)(tensors())
    else:
        same_as_stock(layer, harness, tensors())
    assert set(harness.outcomes) == {Outcome.DECLINED}
    assert reason in harness.reasons[0], harness.reasons
    assert operations(harness.last.module) == operations(harness.originals[-1])
    assert harness.last.caches == ()


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        (
            "supported are bfloat16, float16 and float32",
            lambda t: {name: x if name == "at" else x.double() for name, x in t.items()},
        ),
        ("last dimension of K is not contiguous", lambda t: {**t, "K": t["K"].transpose(2, 3).contiguous().transpose(2, 3)}),
        ("head dimension 577 of K is not from 1 to 576", lambda t: tensors(dim=577)),
    ],
)
def test_unsupported_tensors(harness, same_as_stock, reason: str, change: Callable[..., dict[str, torch.Tensor]]) -> None:
    same_as_stock(after_write(lambda t: attend(t["q"], t["K"], t["V"])), harness, change(tensors()))
    assert reason in harness.reasons[0]


def test_caches_that_are_views_of_one_tensor(harness) -> None:
    both = torch.randn(2, 1, 2, ROWS, DIM)
    inputs = {**tensors(), "K": both[0], "V": both[1]}
    torch.compile(after_write(lambda t: attend(t["q"], t["K"], t["V"])), backend=harness, fullgraph=True)(inputs)
    assert "K shares its storage with another input" in harness.reasons[0]


def test_gradients(harness) -> None:
    inputs = {**tensors(), "scale": torch.ones(1, requires_grad=True)}
    layer = after_write(lambda t: attend(t["q"] * t["scale"], t["K"], t["V"]))
    with torch.enable_grad():
        torch.compile(layer, backend=harness, fullgraph=True)(inputs)
    assert "inference only" in harness.reasons[0]
    torch._dynamo.reset()
    torch.compile(layer, backend=harness, fullgraph=True)(inputs)
    assert harness.outcomes == [Outcome.REWRITTEN]


def test_other_devices(harness) -> None:
    layer = after_write(lambda t: attend(t["q"], t["K"], t["V"]))
    with pytest.raises(Exception):  # noqa: B017, PT011 - meta tensors hold nothing that could be run
        torch.compile(layer, backend=_raising(harness), fullgraph=True)({k: v.to("meta") for k, v in tensors().items()})
    assert harness.reasons == ["no lowering for device meta yet"]


def _raising(harness):
    def backend(gm, example_inputs):
        harness(gm, example_inputs)
        raise RuntimeError

    return backend
