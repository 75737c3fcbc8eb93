"""Attention written out as product, softmax and product: every form that is recognised, and near misses that are not."""

# ruff: noqa: ANN001 - fixtures and the functions that Dynamo traces read better bare

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from alignedkv_compile.contract import Outcome

BATCH, HEADS, GROUP, ROWS, DIM = 2, 2, 2, 24, 16
LEAST = torch.finfo(torch.float32).min


def tensors(rows: int = 3) -> dict[str, torch.Tensor]:
    def new(heads: int, count: int) -> torch.Tensor:
        return torch.randn(BATCH, heads, count, DIM)

    attends = torch.rand(BATCH, 1, rows, ROWS) < 0.8
    attends[..., 0] = True
    return {
        "q": new(HEADS * GROUP, rows),
        "k": new(HEADS, rows),
        "v": new(HEADS, rows),
        "K": new(HEADS, ROWS),
        "V": new(HEADS, ROWS),
        "at": torch.arange(5, 5 + rows),
        "attends": attends,
        "mask": torch.where(attends, 0.0, LEAST),
        "bias": torch.randn(1, HEADS * GROUP, 1, ROWS),
        "alibi": torch.randn(BATCH * HEADS * GROUP, 1, ROWS),
        "sinks": torch.randn(HEADS * GROUP),
    }


def repeat_kv(cache: torch.Tensor) -> torch.Tensor:
    return cache[:, :, None].expand(BATCH, HEADS, GROUP, ROWS, DIM).reshape(BATCH, HEADS * GROUP, ROWS, DIM)


def written(t) -> tuple[torch.Tensor, torch.Tensor]:
    t["K"].index_copy_(2, t["at"], t["k"])
    t["V"].index_copy_(2, t["at"], t["v"])
    return repeat_kv(t["K"]), repeat_kv(t["V"])


def form(scores: Callable[..., torch.Tensor], weights: Callable[..., torch.Tensor] = lambda t, x: x):
    """Attention whose logits are ``scores(t, q @ k^T)`` and whose weights are ``weights(t, softmax)``."""

    def layer(t):
        key, value = written(t)
        logits = scores(t, t["q"] @ key.transpose(2, 3))
        return weights(t, torch.softmax(logits, -1)) @ value

    return layer


def in_place(t, x):
    x *= 0.25
    x += t["bias"]
    x += t["mask"]
    return x


def with_sinks(t):
    key, value = written(t)
    logits = t["q"] @ key.transpose(2, 3) * 0.25 + t["mask"]
    sinks = t["sinks"].reshape(1, -1, 1, 1).expand(BATCH, -1, logits.shape[2], -1)
    combined = torch.cat([logits, sinks], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    return torch.softmax(combined, dim=-1, dtype=combined.dtype)[..., :-1] @ value


def with_a_factor(t, logits_of_the_factor=lambda logits: logits):
    """Granite's sinks: what they leave of the weights is a factor of the output."""
    key, value = written(t)
    logits = t["q"] @ key.transpose(2, 3) * 0.25 + t["mask"]
    total = torch.logsumexp(logits_of_the_factor(logits), dim=-1)
    left = (total - t["sinks"].view(1, -1, 1)).to(torch.float32).sigmoid()
    return torch.softmax(logits, dim=-1, dtype=torch.float32).to(logits.dtype) @ value * left.unsqueeze(-1).to(logits.dtype)


def value_written_before_the_factor(t):
    key, value = written(t)
    logits = t["q"] @ key.transpose(2, 3)
    output = torch.softmax(logits, dim=-1) @ value
    t["K"].index_copy_(2, t["at"], t["k"] * 2)
    t["V"].index_copy_(2, t["at"], t["v"] * 2)
    return output * (torch.logsumexp(logits, dim=-1) - t["sinks"].view(1, -1, 1)).sigmoid()[..., None]


def key_written_on_the_way(t):
    key, value = written(t)
    scores = t["q"] @ key.transpose(2, 3)
    t["K"].index_copy_(2, t["at"], t["k"] * 2)
    t["V"].index_copy_(2, t["at"], t["v"] * 2)
    return scores.softmax(-1) @ value


def query_written_on_the_way(t):
    key, value = written(t)
    query = t["q"] * 1.0
    scores = query @ key.transpose(2, 3)
    query.mul_(2)
    return scores.softmax(-1) @ value


def in_double_and_back(t):
    key, value = written(t)
    logits = torch.matmul(t["q"].float(), key.float().transpose(-1, -2)) / 4.0 + t["mask"]
    return torch.matmul(torch.nn.functional.softmax(logits.float(), dim=-1).type_as(t["q"]), value)


def folded_scores(t, value_form: Callable[..., torch.Tensor]):
    key, value = (x.reshape(BATCH * HEADS * GROUP, ROWS, DIM) for x in written(t))
    query = t["q"].reshape(BATCH * HEADS * GROUP, -1, DIM)
    weights = value_form(query, key.transpose(1, 2)).softmax(-1)
    return torch.bmm(weights, value).view(BATCH, HEADS * GROUP, -1, DIM)


def with_bmm(t):
    def logits(query, key):
        four = torch.bmm(query, key).view(BATCH, HEADS * GROUP, -1, ROWS) + t["mask"]
        return torch.max(four, torch.tensor(LEAST)).view(BATCH * HEADS * GROUP, -1, ROWS)

    return folded_scores(t, logits)


def with_baddbmm(t):
    return folded_scores(t, lambda query, key: t["alibi"].baddbmm(batch1=query, batch2=key, beta=1.0, alpha=0.25))


def with_baddbmm_and_matmul(t):
    """Scores with batch and heads folded, values without, as GPT-NeoX Japanese has them."""
    key, value = (x.reshape(BATCH, HEADS * GROUP, ROWS, DIM) for x in written(t))
    query, key = t["q"].reshape(BATCH * HEADS * GROUP, -1, DIM), key.reshape(BATCH * HEADS * GROUP, ROWS, DIM)
    zeros = torch.zeros(query.shape[0], query.shape[1], ROWS)
    scores = torch.baddbmm(zeros, query, key.transpose(1, 2), beta=1.0, alpha=0.25)
    return (scores.view(BATCH, HEADS * GROUP, -1, ROWS) + t["mask"]).softmax(-1) @ value


def with_zeros_that_are_written(t):
    """What starts as zeros is a bias by the time that it is added."""
    key, value = (x.reshape(BATCH, HEADS * GROUP, ROWS, DIM) for x in written(t))
    query, key = t["q"].reshape(BATCH * HEADS * GROUP, -1, DIM), key.reshape(BATCH * HEADS * GROUP, ROWS, DIM)
    bias = torch.zeros(query.shape[0], query.shape[1], ROWS)
    bias.add_(t["alibi"])
    scores = torch.baddbmm(bias, query, key.transpose(1, 2), beta=1.0, alpha=0.25)
    return scores.view(BATCH, HEADS * GROUP, -1, ROWS).softmax(-1) @ value


def with_a_folded_bias(t):
    return folded_scores(t, lambda query, key: torch.bmm(query, key) * 0.25 + t["alibi"])


def written_in_tiles(t) -> tuple[torch.Tensor, torch.Tensor]:
    """KV heads in turn, as JetMoe repeats them: query head i reads KV head i % H."""
    written(t)
    return t["K"].repeat(1, GROUP, 1, 1), t["V"].repeat(1, GROUP, 1, 1)


def with_tiled_heads(t):
    key, value = written_in_tiles(t)
    return (t["q"] @ key.transpose(2, 3) * 0.25 + t["bias"]).softmax(-1) @ value


def with_tiled_heads_and_sinks(t):
    key, value = written_in_tiles(t)
    logits = t["q"] @ key.transpose(2, 3) + t["mask"]
    sinks = t["sinks"].reshape(1, -1, 1, 1).expand(BATCH, -1, logits.shape[2], -1)
    return torch.cat([logits, sinks], dim=-1).softmax(-1)[..., :-1] @ value


FORMS: dict[str, Callable[..., torch.Tensor]] = {
    "bare": form(lambda t, x: x),
    "scaled": form(lambda t, x: x * 0.25),
    "divided": form(lambda t, x: x / 4.0),
    "masked": form(lambda t, x: x * 0.25 + t["mask"]),
    "masked from the left": form(lambda t, x: t["mask"] + x / 4.0),
    "bias per head and mask": form(lambda t, x: x * 0.25 + t["bias"] + t["mask"]),
    "scaled after the mask": form(lambda t, x: (x + t["mask"] + t["bias"]) / 4.0),
    "masked_fill": form(lambda t, x: (x * 0.25).masked_fill(~t["attends"], LEAST)),
    "where": form(lambda t, x: torch.where(t["attends"], x * 0.25, torch.full([], LEAST))),
    "masked_fill and bias": form(lambda t, x: (x * 0.25 + t["bias"]).masked_fill(~t["attends"], LEAST)),
    "clamped": form(lambda t, x: torch.max(x + t["mask"], torch.tensor(LEAST))),
    "shifted": form(lambda t, x: x - x.max(dim=-1, keepdim=True).values),
    "in place": form(in_place),
    "dropout that is off": form(lambda t, x: x, lambda t, w: torch.dropout(w, 0.5, False)),
    "casts": in_double_and_back,
    "soft cap": form(lambda t, x: torch.tanh(x * 0.25 / 2.0) * 2.0 + t["mask"]),
    "sinks": with_sinks,
    "sinks as a factor": with_a_factor,
    "tiled heads": with_tiled_heads,
    "tiled heads and sinks": with_tiled_heads_and_sinks,
    "bmm": with_bmm,
    "baddbmm": with_baddbmm,
    "baddbmm and matmul": with_baddbmm_and_matmul,
    "zeros that are written": with_zeros_that_are_written,
    "a folded bias": with_a_folded_bias,
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(harness, same_as_stock, operations, name: str) -> None:
    same_as_stock(FORMS[name], harness, tensors())
    assert harness.outcomes == [Outcome.REWRITTEN], harness.reasons
    after = operations(harness.last.module)
    assert after["aligned_read_attention.default"] == after["quantize_on_write.default"] == 1
    assert after["softmax"] == after["matmul"] == after["bmm"] == after["baddbmm"] == 0


@pytest.mark.parametrize("name", ["masked", "bmm", "baddbmm", "soft cap", "sinks"])
def test_many_steps_and_planes(eager_backend, name: str) -> None:
    backend = eager_backend(2.0)
    compiled = torch.compile(FORMS[name], backend=backend, fullgraph=True)
    t = tensors(1)
    stock = {key: value.clone() for key, value in t.items()}
    for position in range(6, 20):
        for inputs in (t, stock):
            inputs["at"] = torch.tensor([position])
        torch.testing.assert_close(compiled(t), FORMS[name](stock), rtol=0, atol=1e-5)
    assert backend.outcomes == [Outcome.REWRITTEN]


@pytest.mark.parametrize("name", ["masked", "bmm"])
def test_long_queries_are_left_alone(harness, same_as_stock, operations, name: str) -> None:
    same_as_stock(FORMS[name], harness, tensors(17))
    assert harness.outcomes == [Outcome.PREFILL]
    assert operations(harness.last.module)["softmax"] == 1


def test_over_a_concatenation(harness, same_as_stock, operations) -> None:
    def layer(query, key, value, past_key, past_value):
        keys, values = torch.cat([past_key, key], -2), torch.cat([past_value, value], -2)
        return (query @ keys.transpose(2, 3) / 4.0).softmax(-1) @ values, keys, values

    def new(rows):
        return torch.randn(2, 4, rows, DIM)

    same_as_stock(layer, harness, new(1), new(1), new(1), new(9), new(9))
    assert harness.outcomes == [Outcome.REWRITTEN]
    assert operations(harness.last.module)["cat"] == 0


def test_a_factor_over_a_concatenation(harness, same_as_stock, operations) -> None:
    def layer(query, key, value, past_key, past_value, sinks):
        keys, values = torch.cat([past_key, key], -2), torch.cat([past_value, value], -2)
        logits = query @ keys.transpose(2, 3) / 4.0
        left = (logits.logsumexp(-1) - sinks.view(1, -1, 1)).sigmoid().unsqueeze(-1)
        return logits.softmax(-1) @ values * left, keys, values

    def new(rows):
        return torch.randn(2, 4, rows, DIM)

    same_as_stock(layer, harness, new(1), new(1), new(1), new(9), new(9), torch.randn(4))
    assert harness.outcomes == [Outcome.REWRITTEN]
    assert operations(harness.last.module)["cat"] == operations(harness.last.module)["sigmoid"] == 0


def test_weights_that_are_returned_keep_the_attention(harness, same_as_stock, operations) -> None:
    def layer(t):
        key, value = written(t)
        weights = (t["q"] @ key.transpose(2, 3)).softmax(-1)
        return weights @ value, weights

    same_as_stock(layer, harness, tensors())
    assert harness.outcomes == [Outcome.DECLINED]
    assert harness.reasons == ["the attention weights are also read by output"]
    assert operations(harness.last.module) == operations(harness.originals[-1])


NEAR_MISSES: dict[str, Callable[..., torch.Tensor]] = {
    "softmax over the wrong dimension": lambda t: (t["q"] @ written(t)[0].transpose(2, 3)).softmax(1) @ repeat_kv(t["V"]),
    "weights changed": form(lambda t, x: x, lambda t, w: w + 0.1),
    "weights dropped out": form(lambda t, x: x, lambda t, w: w * 2),
    "bool added": form(lambda t, x: x + t["attends"]),
    "masked with a number that is not least": form(lambda t, x: x.masked_fill(~t["attends"], -5.0)),
    "square of the scores": form(lambda t, x: x * x),
    "other maximum subtracted": form(lambda t, x: x - t["bias"].max(dim=-1, keepdim=True).values),
    "tanh with two caps": form(lambda t, x: 30.0 * torch.tanh(x / 50.0)),
    "last column cut without sinks": lambda t: (
        (t["q"] @ written(t)[0].transpose(2, 3)).softmax(-1)[..., :-1] @ repeat_kv(t["V"])[:, :, :-1]
    ),
    "sinks that are not dropped": lambda t: (
        torch.cat([t["q"] @ written(t)[0].transpose(2, 3), t["bias"].expand(BATCH, -1, 3, -1)], -1).softmax(-1)
        @ torch.cat([repeat_kv(t["V"])] * 2, 2)
    ),
    "a factor of other logits": lambda t: with_a_factor(t, lambda logits: logits * 2),
    "sinks per batch entry": lambda t: (
        torch.cat([t["q"] @ written(t)[0].transpose(2, 3), t["q"][:, :, :, :1]], -1).softmax(-1)[..., :-1] @ repeat_kv(t["V"])
    ),
    "values written before the factor": value_written_before_the_factor,
    "keys written on the way": key_written_on_the_way,
    "query written on the way": query_written_on_the_way,
    "mask turned round": form(lambda t, x: x.masked_fill(~t["attends"], LEAST) * -0.25),
    "clamp turned round": form(lambda t, x: torch.max(x, torch.tensor(LEAST)) * -1.0),
    "clamped from above": form(lambda t, x: torch.clamp(x, max=1.0)),
    "a bias inside the cap": form(lambda t, x: 30.0 * torch.tanh((x + t["bias"]) / 30.0)),
    "scores scaled by a tensor": form(lambda t, x: x * t["bias"]),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay_as_they_are(harness, same_as_stock, operations, name: str) -> None:
    same_as_stock(NEAR_MISSES[name], harness, tensors())
    assert set(harness.outcomes) == {Outcome.DECLINED}
    assert operations(harness.last.module) == operations(harness.originals[-1])
