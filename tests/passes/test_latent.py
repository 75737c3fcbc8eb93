"""Attention over expanded latents: the absorbed form, values over many steps, near misses, models."""

# ruff: noqa: ANN001, ANN002 - fixtures and the functions that Dynamo traces read better bare

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import alignedkv_compile
from alignedkv_compile.contract import Outcome
from alignedkv_compile.options import Options

HEADS, NOPE, ROPE, VALUE, RANK, ROWS = 4, 16, 8, 12, 32, 40


def expand(latent, rope, weight, bias=None):
    """What ``expand_kv`` of transformers' models does."""
    both = F.linear(latent, weight, bias).view((latent.shape[0], latent.shape[2], -1, NOPE + VALUE)).transpose(1, 2)
    nope, value = torch.split(both, [NOPE, VALUE], dim=-1)
    rope = rope.expand(-1, nope.shape[1], -1, -1)
    key = both.new_empty(*both.shape[:-1], NOPE + ROPE)
    key[..., :NOPE].copy_(nope)
    key[..., NOPE:].copy_(rope)
    return key, value


def expand_by_cat(latent, rope, weight):
    both = F.linear(latent, weight).reshape(latent.shape[0], latent.shape[2], HEADS, NOPE + VALUE).transpose(1, 2)
    nope, value = both.split([NOPE, VALUE], -1)
    return torch.cat((nope, rope.expand(-1, HEADS, -1, -1)), dim=-1), value


def static_step(query, latent, rope, latents, ropes, positions, weight, mask=None, expand=expand):
    latents.index_copy_(2, positions, latent)
    ropes.index_copy_(2, positions, rope)
    key, value = expand(latents, ropes, weight)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.2)


def dynamic_step(query, latent, rope, past_latent, past_rope, weight, mask=None, expand=expand):
    latents, ropes = torch.cat([past_latent, latent], dim=-2), torch.cat([past_rope, rope], dim=-2)
    key, value = expand(latents, ropes, weight)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.2), latents, ropes


def new_rows(rows: int = 1, dtype: torch.dtype = torch.float32, batch: int = 2) -> list[torch.Tensor]:
    shapes = (HEADS, NOPE + ROPE), (1, RANK), (1, ROPE)
    return [torch.randn(batch, heads, rows, width).to(dtype) for heads, width in shapes]


def caches(rows: int = ROWS, dtype: torch.dtype = torch.float32, batch: int = 2) -> list[torch.Tensor]:
    return [torch.randn(batch, 1, rows, width).to(dtype) for width in (RANK, ROPE)]


def weights(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(HEADS * (NOPE + VALUE), RANK) / RANK**0.5).to(dtype)


def static_inputs(rows: int = 1, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    positions = torch.arange(rows) + 7
    return [*new_rows(rows, dtype), *caches(dtype=dtype), positions, weights(dtype)]


def dynamic_inputs(rows: int = 1, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [*new_rows(rows, dtype), *caches(ROWS - rows, dtype), weights(dtype)]


def make_mask(kind: str, rows: int) -> torch.Tensor | None:
    allowed = torch.rand(2, 1, rows, ROWS) < 0.8
    allowed[..., 7] = True
    if kind == "bool":
        return allowed
    return None if kind == "none" else torch.where(allowed, torch.randn(2, HEADS, rows, ROWS), torch.finfo(torch.float32).min)


STEPS = {"static": (static_step, static_inputs), "dynamic": (dynamic_step, dynamic_inputs)}


@pytest.mark.parametrize("how", [expand, expand_by_cat])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_static_cache_of_latents(harness, same_as_stock, operations, rows: int, mask: str, how) -> None:
    def step(*args):
        return static_step(*args, expand=how)

    same_as_stock(step, harness, *static_inputs(rows), make_mask(mask, rows))
    assert harness.outcomes == [Outcome.REWRITTEN]
    before, after = operations(harness.originals[-1]), operations(harness.last.module)
    assert before["linear"] == 1
    for gone in ("linear", "split", "new_empty", "copy_", "expand", "scaled_dot_product_attention"):
        assert after[gone] == 0
    assert after["quantize_on_write.default"] == after["aligned_read_attention.default"] == 1
    assert after["index_copy_"] == 3, "the model's caches, and the rows that hold both"


@pytest.mark.parametrize("how", [expand, expand_by_cat])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_dynamic_cache_of_latents(harness, same_as_stock, operations, rows: int, mask: str, how) -> None:
    def step(*args):
        return dynamic_step(*args, expand=how)

    same_as_stock(step, harness, *dynamic_inputs(rows), make_mask(mask, rows))
    assert harness.outcomes == [Outcome.REWRITTEN]
    after = operations(harness.last.module)
    for gone in ("linear", "split", "new_empty", "copy_", "expand", "scaled_dot_product_attention"):
        assert after[gone] == 0
    assert after["cat"] == 2, "new rows, and the query"
    assert after["quantize_on_write.default"] == after["aligned_read_attention.default"] == 1
    assert len(harness.last.kept_outputs) == harness.last.outputs - 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_absorbed_form_is_at_least_as_precise(make_harness, dtype: torch.dtype) -> None:
    harness = make_harness(Options(min_context=0))
    errors = []
    for _ in range(8):
        inputs = static_inputs(dtype=dtype)
        truth = static_step(*[one.double() if one.is_floating_point() else one for one in inputs])
        stock = static_step(*copy.deepcopy(inputs))
        actual = torch.compile(static_step, backend=harness, fullgraph=True)(*inputs)
        assert actual.dtype == dtype
        errors.append([(result.double() - truth).square().mean() for result in (actual, stock)])
    absorbed, stock_error = torch.tensor(errors).mean(0).sqrt().tolist()
    assert absorbed <= stock_error


@pytest.mark.parametrize("tolerance", [0.0, 2.0])
def test_static_latents_over_many_steps_with_edits(eager_backend, tolerance: float) -> None:
    backend = eager_backend(tolerance)
    step = torch.compile(static_step, backend=backend, fullgraph=True)
    cache, weight = caches(), weights()
    for tensor in cache:
        tensor[:, :, 5:] = 0
    stock = [tensor.clone() for tensor in cache]
    other = [tensor.clone() for tensor in cache]
    for position in range(5, 30):
        if position == 11:
            for tensor in (cache[0], stock[0]):
                tensor[:, :, 4] = 2.0
        if position == 17:
            for tensor in (cache[1], stock[1]):
                tensor[:, :, :3].neg_()
        if position == 23:  # rows that are reordered, as beam search does
            for tensor in (*cache, *stock):
                tensor.copy_(tensor.flip(0))
        inputs, positions = new_rows(), torch.tensor([position])
        mask = (torch.arange(ROWS) <= position)[None, None, None]
        actual = step(*inputs, *cache, positions, weight, mask)
        assert (actual - static_step(*inputs, *stock, positions, weight, mask)).abs().max() < 1e-5
        assert all(map(torch.equal, cache, stock))
        if position % 5 == 0:  # another cache through the same code
            step(*inputs, *other, positions, weight, mask)
    assert backend.outcomes == [Outcome.REWRITTEN]
    assert len(backend.graphs) == 1


@pytest.mark.parametrize("tolerance", [0.0, 2.0])
def test_dynamic_latents_over_many_steps_with_edits_forks_and_crops(eager_backend, tolerance: float) -> None:
    backend = eager_backend(tolerance)
    step = torch.compile(dynamic_step, backend=backend, fullgraph=True)
    cache, weight = caches(3), weights()
    stock = [tensor.clone() for tensor in cache]
    for number in range(30):
        if number in (9, 14):
            which = number == 14
            for tensor in (cache[which], stock[which]):
                tensor[:, :, 4] = 2.0
        if number == 17:
            cache, stock = ([tensor[:, :, :-6] for tensor in both] for both in (cache, stock))
        if number == 21:  # beam search
            cache, stock = ([tensor.index_select(0, torch.tensor([1, 1])) for tensor in both] for both in (cache, stock))
        if number == 25:  # rope keys of another origin
            cache[1], stock[1] = cache[1].clone(), stock[1].clone()
        inputs = new_rows(3 if number % 7 == 6 else 1)
        if number % 5 == 0:  # a fork that is thrown away
            step(*new_rows(), *cache, weight)
        actual, *cache = step(*inputs, *cache, weight)
        expected, *stock = dynamic_step(*inputs, *stock, weight)
        assert (actual - expected).abs().max() < 1e-5
        assert all(map(torch.equal, cache, stock))
        assert backend.graphs[0].sites[0].outcome is Outcome.REWRITTEN


def test_one_graph_for_all_lengths(eager_backend) -> None:
    backend = eager_backend(2.0)
    step = torch.compile(dynamic_step, backend=backend, fullgraph=True)
    cache, weight = caches(5), weights()
    for _ in range(8):
        _, *cache = step(*new_rows(), *cache, weight)
    assert len(backend.graphs) == 2, "one graph for the first length, one symbolic in it"


def test_two_attentions_over_one_expansion(harness, same_as_stock, operations) -> None:
    def step(query, latent, rope, latents, ropes, positions, weight):
        latents.index_copy_(2, positions, latent)
        ropes.index_copy_(2, positions, rope)
        key, value = expand(latents, ropes, weight)
        first = F.scaled_dot_product_attention(query, key, value)
        return first + F.scaled_dot_product_attention(query.sin(), key, value)

    same_as_stock(step, harness, *static_inputs())
    assert harness.outcomes == [Outcome.REWRITTEN] * 2
    after = operations(harness.last.module)
    assert after["quantize_on_write.default"] == len(harness.last.caches) == 1
    assert after["linear"] == 0


@pytest.mark.parametrize("what", ["latent", "key", "value"])
def test_another_reader_of_static_latents_gets_what_it_reads(harness, same_as_stock, operations, what: str) -> None:
    def step(query, latent, rope, latents, ropes, positions, weight):
        latents.index_copy_(2, positions, latent)
        ropes.index_copy_(2, positions, rope)
        key, value = expand(latents, ropes, weight)
        read = {"latent": latents, "key": key, "value": value}[what]
        return F.scaled_dot_product_attention(query, key, value), read.sum(-1)

    same_as_stock(step, harness, *static_inputs())
    assert harness.outcomes == [Outcome.REWRITTEN]
    after = operations(harness.last.module)
    assert after["linear"] == (what != "latent")
    assert after["copy_"] == 2 * (what == "key")


@pytest.mark.parametrize("what", ["latents", "rope", "past", "key", "value"])
def test_another_reader_of_dynamic_latents_is_refused(harness, same_as_stock, what: str) -> None:
    def step(query, latent, rope, past_latent, past_rope, weight):
        latents, ropes = torch.cat([past_latent, latent], dim=-2), torch.cat([past_rope, rope], dim=-2)
        key, value = expand(latents, ropes, weight)
        read = {"latents": latents, "rope": ropes, "past": past_latent, "key": key, "value": value}[what]
        return F.scaled_dot_product_attention(query, key, value), latents, ropes, read.sum(-1)

    same_as_stock(step, harness, *dynamic_inputs())
    assert harness.outcomes == [Outcome.DECLINED]
    assert "also read by sum" in harness.reasons[0]
    assert harness.last.caches == ()


def test_expanded_latents_that_are_returned_are_refused(harness, same_as_stock) -> None:
    def step(query, latent, rope, past_latent, past_rope, weight):
        latents, ropes = torch.cat([past_latent, latent], dim=-2), torch.cat([past_rope, rope], dim=-2)
        key, value = expand(latents, ropes, weight)
        return F.scaled_dot_product_attention(query, key, value), latents, ropes, key

    same_as_stock(step, harness, *dynamic_inputs())
    assert harness.outcomes == [Outcome.DECLINED]
    assert "the expanded latents are also read" in harness.reasons[0]


@pytest.mark.parametrize("dynamic", [False, True])
def test_sizes_of_dynamic_latents_may_be_asked_for(harness, same_as_stock, dynamic: bool) -> None:
    def step(query, latent, rope, past_latent, past_rope, weight):
        out, latents, ropes = dynamic_step(query + past_rope.numel() / 1000, latent, rope, past_latent, past_rope, weight)
        return out + latents.shape[-2] / 1000, latents, ropes

    same_as_stock(step, harness, *dynamic_inputs(), dynamic=dynamic)
    assert harness.outcomes == [Outcome.REWRITTEN]


def rope_scaled(latent, rope, weight):
    return expand(latent, rope * 2, weight)


def latent_normalised(latent, rope, weight):
    return expand(F.rms_norm(latent, (RANK,)), rope, weight)


def with_a_bias(latent, rope, weight):
    return expand(latent, rope, weight, weight[:, 0])


def value_edited(latent, rope, weight):
    key, value = expand(latent, rope, weight)
    return key, value.mul_(2)


def key_edited(latent, rope, weight):
    key, value = expand(latent, rope, weight)
    key[..., 3:4].copy_(key[..., 2:3])
    return key, value


def rope_first(latent, rope, weight):
    key, value = expand(latent, rope, weight)
    return torch.cat((rope.expand(-1, HEADS, -1, -1), key[..., :NOPE]), -1), value


def value_of_other_latents(latent, rope, weight):
    return expand(latent, rope, weight)[0], expand(latent, rope, weight.flip(0))[1]


def heads_by_rows(latent, rope, weight):
    both = F.linear(latent, weight).view(latent.shape[0], HEADS, latent.shape[2], NOPE + VALUE)
    nope, value = torch.split(both, [NOPE, VALUE], dim=-1)
    return torch.cat((nope, rope.expand(-1, HEADS, -1, -1)), -1), value


def overlapping(latent, rope, weight):
    key, value = expand(latent, rope, weight)
    wrong = torch.empty_like(key).new_empty(key.shape)
    wrong[..., ROPE:].copy_(key[..., :NOPE])
    wrong[..., :ROPE].copy_(rope.expand(-1, HEADS, -1, -1))
    return wrong, value


def heads_exchanged(latent, rope, weight):
    key, value = expand(latent, rope, weight)
    return key, value.flip(1)


NEAR_MISSES = [
    (rope_scaled, ""),
    (latent_normalised, ""),
    (with_a_bias, "the latents' projection has a bias"),
    (value_edited, ""),
    (key_edited, ""),
    (rope_first, ""),
    (value_of_other_latents, "different products"),
    (heads_by_rows, ""),
    (overlapping, ""),
    (heads_exchanged, ""),
]


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize(("how", "reason"), NEAR_MISSES, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_no_expansion_is_left_alone(harness, same_as_stock, operations, kind: str, how, reason: str) -> None:
    plain_step, inputs = STEPS[kind]

    def step(*args):
        return plain_step(*args, expand=how)

    same_as_stock(step, harness, *inputs())
    assert set(harness.outcomes) == {Outcome.DECLINED}
    assert reason in " ".join(harness.reasons)
    assert operations(harness.last.module) == operations(harness.originals[-1])


def test_a_write_after_the_expansion_is_refused(harness, same_as_stock) -> None:
    def step(query, latent, rope, latents, ropes, positions, weight):
        latents.index_copy_(2, positions, latent)
        ropes.index_copy_(2, positions, rope)
        key, value = expand(latents, ropes, weight)
        later = positions + 1
        latents.index_copy_(2, later, latent)
        ropes.index_copy_(2, later, rope)
        return F.scaled_dot_product_attention(query, key, value)

    same_as_stock(step, harness, *static_inputs())
    assert harness.outcomes == [Outcome.DECLINED]
    assert "between the expansion" in harness.reasons[0]


def test_an_expansion_before_the_write_is_refused(harness, same_as_stock) -> None:
    def step(query, latent, rope, latents, ropes, positions, weight):
        key, value = expand(latents, ropes, weight)
        out = F.scaled_dot_product_attention(query, key, value)
        latents.index_copy_(2, positions, latent)
        ropes.index_copy_(2, positions, rope)
        return out

    same_as_stock(step, harness, *static_inputs())
    assert harness.outcomes == [Outcome.DECLINED]
    assert "after the attention" in harness.reasons[0]


def test_a_weight_that_changes_is_refused(harness, same_as_stock) -> None:
    def step(*args):
        out = static_step(*args)
        args[6].mul_(0.5)
        return out

    same_as_stock(step, harness, *static_inputs())
    assert harness.outcomes == [Outcome.DECLINED]
    assert "weight is also written" in harness.reasons[0]


def test_rows_too_long_together_are_refused(harness, same_as_stock, monkeypatch) -> None:
    monkeypatch.setattr("alignedkv_compile.passes.attention.MAX_HEAD_DIM", RANK + ROPE - 1)
    same_as_stock(static_step, harness, *static_inputs())
    assert harness.outcomes == [Outcome.DECLINED]
    assert "head dimension 40 of latent and rope key together" in harness.reasons[0]
    assert len(harness.last.sites[0].cache) == 2


def test_gradients_are_refused(harness) -> None:
    inputs = static_inputs()
    inputs[6].requires_grad_()
    with torch.enable_grad():
        torch.compile(static_step, backend=harness, fullgraph=True)(*inputs)
    assert harness.outcomes[0] == Outcome.DECLINED
    assert "requires grad" in harness.reasons[0]


@pytest.mark.parametrize("kind", STEPS)
def test_certified_reads_are_refused(make_harness, same_as_stock, kind: str) -> None:
    harness = make_harness(Options(guarantee="worst_case", min_context=0))
    step, inputs = STEPS[kind]
    same_as_stock(step, harness, *inputs())
    assert harness.outcomes == [Outcome.DECLINED]
    assert "bounds the error of a read of latents" in harness.reasons[0]


@pytest.mark.parametrize("kind", STEPS)
def test_a_long_query_is_left_alone(harness, same_as_stock, operations, kind: str) -> None:
    step, inputs = STEPS[kind]
    same_as_stock(step, harness, *inputs(17))
    assert harness.outcomes == [Outcome.PREFILL]
    assert harness.last.caches == ()
    assert operations(harness.last.module) == operations(harness.originals[-1])


MODEL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": RANK,
    "qk_rope_head_dim": ROPE,
    "qk_nope_head_dim": NOPE,
    "v_head_dim": VALUE,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 2,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


@pytest.mark.parametrize(
    ("name", "kind", "dtype", "tolerance"),
    [
        ("DeepseekV2", "static", torch.bfloat16, 0.0),
        ("DeepseekV2", "dynamic", torch.float32, 2.0),
        ("DeepseekV3", "static", torch.float32, 2.0),
        ("DeepseekV3", "static", torch.bfloat16, 2.0),
        ("DeepseekV3", "dynamic", torch.bfloat16, 2.0),
    ],
)
def test_models_with_latents(eager_backend, name: str, kind: str, dtype: torch.dtype, tolerance: float) -> None:
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**MODEL)).eval().to(dtype)
    truth_model = copy.deepcopy(model).double()
    backend = eager_backend(tolerance)
    runs = (torch.compile(model, backend=backend, fullgraph=True), model, truth_model)
    if kind == "static":
        made = [transformers.StaticCache(config=model.config, max_cache_len=ROWS) for _ in runs]
    else:
        made = [transformers.DynamicCache(config=model.config) for _ in runs]
    prompt = torch.randint(0, 128, (2, 7))
    for run, cache in zip((model, model, truth_model), made, strict=True):
        run(prompt, past_key_values=cache)
    errors = []
    for rows in (4, 1, 1, 1, 1):
        tokens = torch.randint(0, 128, (2, rows))
        actual, stock, truth = (run(tokens, past_key_values=cache).logits for run, cache in zip(runs, made, strict=True))
        assert backend.outcomes == [Outcome.REWRITTEN] * 2
        errors.append([(result.double() - truth).square().mean() for result in (actual, stock)])
    error, stock_error = torch.tensor(errors).mean(0).sqrt().tolist()
    assert error <= (2 if dtype == torch.float32 else 1.5) * stock_error


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generated_code(dtype: torch.dtype) -> None:
    def steps(query, latent, rope, latents, ropes, positions, past_latent, past_rope, weight):
        mask = (torch.arange(ROWS) <= positions[-1])[None, None, None]
        fixed = static_step(query, latent, rope, latents, ropes, positions, weight, mask)
        return fixed, *dynamic_step(query, latent, rope, past_latent, past_rope, weight)

    compiled = torch.compile(steps, backend="alignedkv", fullgraph=True, options={"min_context": 0})
    static, grown, weight = caches(dtype=dtype), caches(2, dtype), weights(dtype)
    stock, stock_grown = ([tensor.clone() for tensor in cache] for cache in (static, grown))
    for position in range(4):
        inputs, positions = new_rows(dtype=dtype), torch.tensor([position])
        fixed, growing, *grown = compiled(*inputs, *static, positions, *grown, weight)
        expected = steps(*inputs, *stock, positions, *stock_grown, weight)
        stock_grown = expected[2:]
        for left, right in ((fixed, expected[0]), (growing, expected[1])):
            assert (left - right).abs().max() < (1e-4 if dtype == torch.float32 else 0.05)
        assert all(map(torch.equal, (*static, *grown), (*stock, *stock_grown)))
    assert alignedkv_compile.report().rewritten == alignedkv_compile.report().found > 0
