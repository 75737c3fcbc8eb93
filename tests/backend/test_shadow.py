"""Shadow checks of compiled graphs: the caller's numbers stay the same, and what a read is off by is found."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

import alignedkv_compile
from alignedkv_compile import ShadowCheck, metrics, shadow
from alignedkv_compile.metrics import names
from alignedkv_compile.runtime import STORES
from alignedkv_compile.state.sidecar import SidecarStore

pytestmark = pytest.mark.usefixtures("no_grad")

OPTIONS = {"tolerance": 2.0, "stats": True, "min_context": 0, "accuracy": "bfloat16"}
"""Those of all tests, so that they share compiled code. The accuracy lets reads of the fp32 caches skip bits."""
ROWS, LIVE = 640, 600


@pytest.fixture
def checks() -> Iterator[list[ShadowCheck]]:
    """Every check from now on."""
    alignedkv_compile.reset_stats()
    found: list[ShadowCheck] = []
    remove = alignedkv_compile.on_shadow(found.append)
    yield found
    remove()
    alignedkv_compile.reset_stats()


def compile_step(function: Any, **options: Any) -> Any:
    return torch.compile(function, backend="alignedkv", fullgraph=True, options={**OPTIONS, **options})


def filled(steps: Any, live: int = LIVE) -> Any:
    """A static cache of random rows."""
    torch.manual_seed(0)
    inputs = steps.inputs(ROWS)
    inputs.keys[:, :, :live].normal_()
    inputs.values[:, :, :live].normal_()
    inputs.length = live
    return inputs


def test_one_call_in_n_is_checked_and_the_caller_sees_no_difference(steps: Any, checks: list[ShadowCheck]) -> None:
    results, counted = [], []
    for every in (0, 3):
        torch._dynamo.reset()
        alignedkv_compile.reset_stats()
        compiled, inputs = compile_step(steps.static, shadow_every=every), filled(steps)
        results.append([compiled(*inputs.next()) for _ in range(7)])
        counted.append({**alignedkv_compile.stats().to_dict(), "graph": None})
        assert len(checks) == (0 if every == 0 else 2)
    assert all(torch.equal(without, with_checks) for without, with_checks in zip(*results, strict=True))
    assert counted[0] == counted[1]
    assert 0 < counted[0]["bytes_read"] < counted[0]["bytes_full"], "bits must be skipped, or there is nothing to check"
    assert [check.call for check in checks] == [3, 6]
    assert all(set(check.errors) == {0} for check in checks)
    assert all(0 < check.worst <= 1 for check in checks)


@pytest.mark.slow
def test_a_growing_cache(steps: Any, checks: list[ShadowCheck]) -> None:
    torch.manual_seed(0)
    compiled = compile_step(steps.dynamic, shadow_every=2)
    rows = [torch.randn(1, steps.kv_heads, LIVE, steps.head_dim) for _ in range(2)]
    for _ in range(4):
        new = [torch.randn(1, heads, 1, steps.head_dim) for heads in (steps.heads, steps.kv_heads, steps.kv_heads)]
        expected = torch.nn.functional.scaled_dot_product_attention(
            new[0], *(torch.cat([past, one], 2) for past, one in zip(rows, new[1:], strict=True)), enable_gqa=True
        )
        output, *rows = compiled(*new, *rows)
        torch.testing.assert_close(output, expected, rtol=5e-2, atol=5e-2)
    assert rows[0].shape[2] == LIVE + 4
    assert len(checks) >= 1
    assert all(0 < check.worst <= 1 for check in checks)


def test_wrong_planes_are_found_counted_and_warned_of(
    steps: Any, checks: list[ShadowCheck], caplog: pytest.LogCaptureFixture
) -> None:
    registry = CollectorRegistry()
    registration = metrics.register(registry)
    compiled, inputs = compile_step(steps.static, shadow_every=1), filled(steps)
    compiled(*inputs.next())
    graph = checks[0].graph
    assert checks[0].worst <= 1

    def value(metric: names.Metric, **labels: str) -> float | None:
        return registry.get_sample_value(metric.name, {"graph": graph, **labels})

    assert value(names.SHADOW_EXCEEDED, layer="0") == 0, "an alert on its increase needs to have seen the zero"
    inputs.keys.data.mul_(-2.0)  # a write that counts no version: the planes are wrong from here on
    with caplog.at_level(logging.WARNING, "alignedkv_compile"):
        for _ in range(2):
            compiled(*inputs.next())
    assert all(check.worst > 10 for check in checks[1:])
    assert caplog.text.count("a shadow check found") == 1
    assert "layer 0" in caplog.text
    assert "tolerance 2" in caplog.text
    assert value(names.SHADOW_CHECKS) == 3
    assert value(names.SHADOW_EXCEEDED, layer="0") == 2
    assert value(names.SHADOW_ERROR, layer="0") == checks[2].worst
    assert value(names.SHADOW_WORST, layer="0") == max(check.worst for check in checks)
    alignedkv_compile.reset_stats()
    assert (value(names.SHADOW_CHECKS), value(names.SHADOW_ERROR, layer="0")) == (0, None)
    registration.close()


def test_what_a_callback_raises_leaves_the_caches_right(steps: Any, checks: list[ShadowCheck]) -> None:
    class ExceededError(Exception):
        pass

    def stop(check: ShadowCheck) -> None:
        raise ExceededError(check.graph)

    compiled, inputs = compile_step(steps.static, shadow_every=1), filled(steps)
    remove = alignedkv_compile.on_shadow(stop)
    with pytest.raises(ExceededError):
        compiled(*inputs.next())
    remove()
    remove()
    compiled(*inputs.next())
    sidecar = STORES.of(SidecarStore).before_call(inputs.keys, inputs.values)
    assert sidecar.history.rebuilds == 0, "the planes were still current"
    assert len(checks) == 2
    assert checks[1].worst <= 1


def test_a_check_that_fails_is_said_and_costs_no_result(
    steps: Any, checks: list[ShadowCheck], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> float:
        raise MemoryError("no room")

    monkeypatch.setattr(shadow, "read_error", broken)
    compiled, inputs = compile_step(steps.static, shadow_every=1), filled(steps)
    with caplog.at_level(logging.WARNING, "alignedkv_compile"):
        assert torch.isfinite(compiled(*inputs.next())).all()
    assert "a shadow check failed, MemoryError: no room" in caplog.text
    assert not checks


def test_graphs_without_reads_have_no_checks(steps: Any, checks: list[ShadowCheck]) -> None:
    compiled, inputs = compile_step(steps.static, shadow_every=1), steps.inputs(ROWS)
    compiled(*inputs.next(rows=20))  # a prefill
    assert not checks


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_every_layer_of_a_model(tiny_llama: Any, kind: str, checks: list[ShadowCheck]) -> None:
    from transformers import DynamicCache, StaticCache

    torch.manual_seed(1)
    make = {
        "static": lambda: StaticCache(tiny_llama.config, max_cache_len=ROWS),
        "dynamic": lambda: DynamicCache(config=tiny_llama.config),
    }[kind]
    prompt, tokens = torch.randint(0, 64, (1, LIVE)), torch.randint(0, 64, (4, 1, 1))
    logits = []
    for every in (0, 1):
        torch._dynamo.reset()
        options = {**OPTIONS, "shadow_every": every}
        compiled, cache = torch.compile(tiny_llama.forward, backend="alignedkv", options=options), make()
        tiny_llama(input_ids=prompt, past_key_values=cache)
        logits.append([compiled(input_ids=token, past_key_values=cache).logits for token in tokens])
    assert all(torch.equal(without, with_checks) for without, with_checks in zip(*logits, strict=True))
    assert len(checks) == len(tokens)
    assert all(set(check.errors) == {0, 1} and 0 < check.worst <= 1 for check in checks)


@pytest.mark.parametrize(
    ("mode", "room"),
    [
        ("8bit", None),
        pytest.param("lossless", ROWS, marks=pytest.mark.slow),
        pytest.param("4bit+", ROWS, marks=pytest.mark.slow),
    ],
)
def test_planes_that_are_the_cache(tiny_llama: Any, mode: str, room: int | None, checks: list[ShadowCheck]) -> None:
    """They are decoded by eager code; what a storage has lost is no error of the read."""
    torch.manual_seed(1)
    prompt, tokens = torch.randint(0, 64, (1, LIVE)), torch.randint(0, 64, (4, 1, 1))
    logits = []
    for every in (0, 1):
        torch._dynamo.reset()
        options = {**OPTIONS, "shadow_every": every, "strict": True}
        compiled = torch.compile(tiny_llama.forward, backend="alignedkv", options=options)
        cache = alignedkv_compile.Cache(tiny_llama.config, mode, room)
        tiny_llama(input_ids=prompt, past_key_values=cache)
        logits.append([])
        for token in tokens:
            cache.get_seq_length()  # makes room, as generate does
            logits[-1].append(compiled(input_ids=token, past_key_values=cache).logits)
    assert all(torch.equal(without, with_checks) for without, with_checks in zip(*logits, strict=True))
    assert len(checks) == len(tokens)
    assert all(set(check.errors) == {0, 1} and 0 < check.worst <= 1 for check in checks)


@pytest.mark.slow
def test_a_certified_read_stays_within_its_bound(steps: Any, checks: list[ShadowCheck]) -> None:
    compiled = compile_step(steps.static, guarantee="worst_case", tolerance=64.0, shadow_every=1)
    inputs = filled(steps)
    for _ in range(3):
        compiled(*inputs.next())
    statistics = alignedkv_compile.stats()
    assert statistics.fraction < 1
    assert statistics.worst_certificate is not None
    assert all(0 < 64.0 * check.worst <= statistics.worst_certificate for check in checks)
