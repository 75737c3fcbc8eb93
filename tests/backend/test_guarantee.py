"""``guarantee="worst_case"`` end to end: every output within its certificate, every certificate within the tolerance."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import alignedkv_compile
from alignedkv_compile import DeclinedError, StatisticsDisabledError
from alignedkv_compile.contract import StatisticsBinding
from alignedkv_compile.ops import COUNTER_FIELDS
from alignedkv_compile.statistics import GraphStatistics
from alignedkv_compile.torch_private import inductor_config

pytestmark = pytest.mark.usefixtures("no_grad")

TOLERANCE, ROUNDOFF = 16.0, 2.0**-8
FLOAT32 = 2.0**-23 / ROUNDOFF
"""Rounding of the float32 output, elementwise, in units of ``u * ||o||``: no part of a certificate."""
CERTIFIED = {
    "guarantee": "worst_case",
    "tolerance": TOLERANCE,
    "accuracy": "bfloat16",
    "min_context": 0,
    "strict": True,
    "stats": True,
}
LIVE, CAPACITY = 400, 512


def certified(function: Any, **options: Any) -> Any:
    return torch.compile(function, backend="alignedkv", options={**CERTIFIED, **options})


def relative_errors(output: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Errors of each query head's output ``[heads]`` against float64, in units of ``u * ||o||``."""
    doubles = [tensor.double() for tensor in (query, keys, values)]
    exact = F.scaled_dot_product_attention(*doubles, enable_gqa=True)
    return ((output.double() - exact).norm(dim=-1) / (ROUNDOFF * output.double().norm(dim=-1)))[0, :, 0]


def check_step(errors: torch.Tensor) -> None:
    """The last call's errors are within its certificates, and those within the tolerance."""
    (layer,) = alignedkv_compile.stats().layers
    assert len(layer.certificates) == len(layer.worst_certificates) == len(errors)
    assert bool((errors <= torch.tensor(layer.certificates) + FLOAT32).all()), (errors, layer)
    assert all(0 < last <= worst for last, worst in zip(layer.certificates, layer.worst_certificates, strict=True))
    assert layer.worst_certificate is not None
    assert layer.worst_certificate <= TOLERANCE * (1 + 2.0**-23)


@pytest.fixture
def filled(steps: Any) -> Any:
    """A static cache with :data:`LIVE` random rows."""
    torch.manual_seed(0)
    inputs = steps.inputs(CAPACITY)
    for cache in (inputs.keys, inputs.values):
        cache[:, :, :LIVE] = torch.randn(1, steps.kv_heads, LIVE, steps.head_dim)
    inputs.length = LIVE
    return inputs


def peaked(inputs: Any) -> tuple[torch.Tensor, ...]:
    """Arguments of the next static step, with a query that leaves most rows little weight."""
    query, *rest = inputs.next()
    return (query * 4, *rest)


def test_static_steps_keep_their_certificates(steps: Any, filled: Any) -> None:
    compiled, last = certified(steps.static), set()
    for _ in range(4):
        args = peaked(filled)
        output = compiled(*args)
        live = filled.length
        check_step(relative_errors(output, args[0], filled.keys[:, :, :live], filled.values[:, :, :live]))
        last.add(alignedkv_compile.stats().certificates)
    assert len(last) == 4, "each call has certificates of its own"
    assert alignedkv_compile.stats().fraction < 0.8


def test_dynamic_steps_keep_their_certificates(steps: Any) -> None:
    """The second call compiles another graph, for a buffer's view as past; the last certificates are the last call's."""
    torch.manual_seed(0)
    compiled = certified(steps.dynamic)
    keys, values = (torch.randn(1, steps.kv_heads, LIVE, steps.head_dim) for _ in range(2))
    for _ in range(4):
        query = torch.randn(1, steps.heads, 1, steps.head_dim) * 4
        new = [torch.randn(1, steps.kv_heads, 1, steps.head_dim) for _ in range(2)]
        output, keys, values = compiled(query, *new, keys, values)
        check_step(relative_errors(output, query, keys, values))
    statistics = alignedkv_compile.stats()
    assert len(alignedkv_compile.report().graphs) == 2
    assert len(statistics.layers) == 1
    assert statistics.calls == 4
    assert statistics.fraction < 0.8


def test_certificates_need_no_statistics(steps: Any, filled: Any) -> None:
    compiled = certified(steps.static, stats=False)
    args = peaked(filled)
    output = compiled(*args)
    live = filled.length
    errors = relative_errors(output, args[0], filled.keys[:, :, :live], filled.values[:, :, :live])
    assert 2 * FLOAT32 < float(errors.max()) <= TOLERANCE, "bits were left out, and not too many"
    with pytest.raises(StatisticsDisabledError):
        alignedkv_compile.stats()


def test_tolerance_zero_reads_everything(steps: Any, filled: Any) -> None:
    compiled = certified(steps.static, tolerance=0.0)
    args = peaked(filled)
    expected = steps.static(*args)
    torch.testing.assert_close(compiled(*args), expected, rtol=1e-5, atol=1e-5)
    statistics = alignedkv_compile.stats()
    assert statistics.fraction == 1.0
    assert statistics.certificates == statistics.worst_certificates == (0.0,) * steps.heads


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_llama(tiny_llama: Any, kind: str) -> None:
    from transformers import DynamicCache, StaticCache

    def cache() -> Any:
        return StaticCache(config, max_cache_len=CAPACITY) if kind == "static" else DynamicCache(config=config)

    torch.manual_seed(1)
    config = tiny_llama.config
    compiled, ours, stock = certified(tiny_llama.forward), cache(), cache()
    prompt = torch.randint(0, 64, (1, LIVE))
    for past in (ours, stock):
        tiny_llama(input_ids=prompt, past_key_values=past)
    for _ in range(3):
        token = torch.randint(0, 64, (1, 1))
        expected = tiny_llama(input_ids=token, past_key_values=stock).logits
        logits = compiled(input_ids=token, past_key_values=ours).logits
        # Attention is one addend of several, so the logits are off by less, relatively, than one attention output may be.
        assert float((logits - expected).norm() / expected.norm()) < TOLERANCE * ROUNDOFF
    report, statistics = alignedkv_compile.report(), alignedkv_compile.stats()
    assert report.found == report.rewritten
    assert len(statistics.layers) == config.num_hidden_layers
    assert statistics.fraction < 1.0
    for layer in statistics.layers:
        assert len(layer.certificates) == config.num_attention_heads
        assert layer.worst_certificate is not None
        assert 0 < layer.worst_certificate <= TOLERANCE * (1 + 2.0**-23)
    assert statistics.worst_certificate == max(layer.worst_certificate or 0.0 for layer in statistics.layers)


def test_statistics_print_and_reset(steps: Any, filled: Any) -> None:
    compiled = certified(steps.static)
    compiled(*peaked(filled))
    statistics = alignedkv_compile.stats()
    line = str(statistics).splitlines()[1]
    assert line == f"  certified: every output within {statistics.worst_certificate:.3g} u*||o||, tolerance 16"
    data = json.loads(json.dumps(statistics.to_dict()))
    assert data["layers"][0]["certificates"] == data["certificates"] == list(statistics.certificates)
    assert data["worst_certificate"] == statistics.worst_certificate
    assert data["tolerance"] == TOLERANCE

    alignedkv_compile.reset_stats()
    cleared = alignedkv_compile.stats()
    assert (cleared.certificate, cleared.worst_certificate, cleared.calls) == (0.0, 0.0, 0)
    compiled(*peaked(filled))
    after = alignedkv_compile.stats()
    assert after.certificates == after.worst_certificates
    assert after.certificates != statistics.certificates


def test_expected_has_no_certificates(steps: Any, filled: Any) -> None:
    certified(steps.static, guarantee="expected")(*peaked(filled))
    statistics = alignedkv_compile.stats()
    assert statistics.certificates == statistics.worst_certificates == statistics.layers[0].certificates == ()
    assert statistics.certificate is statistics.worst_certificate is statistics.tolerance is None
    assert "certified" not in str(statistics)


def graph_statistics(query_heads: tuple[int, ...], tolerance: float, last: float, worst: float) -> GraphStatistics:
    """Those of a graph that was called once, with the same certificates for all heads."""
    examples = [torch.empty(len(query_heads), len(COUNTER_FIELDS), dtype=torch.int64)]
    examples += [torch.empty(len(query_heads), 2, max(query_heads))]
    graph: Any = SimpleNamespace(example_inputs=examples, statistics=StatisticsBinding(0, 1, query_heads))
    made = GraphStatistics(graph, tolerance)
    assert made.bounds is not None
    made.bind([None, None])
    made.bounds[:, 0], made.bounds[:, 1] = last, worst
    return made


def test_recompiled_graphs_count_as_one() -> None:
    """The worst certificates are the largest of all, the last ones the last call's; a graph of other sites stays apart."""
    first = graph_statistics((2, 3), 4.0, last=3.5, worst=3.75)
    second = graph_statistics((2, 3), 8.0, last=1.5, worst=2.0)
    other = graph_statistics((1,), 2.0, last=0.5, worst=1.0)
    statistics = alignedkv_compile.stats()
    assert [layer.certificates for layer in statistics.layers] == [(0.5,), (1.5, 1.5), (1.5, 1.5, 1.5)]
    assert [layer.worst_certificates for layer in statistics.layers] == [(1.0,), (3.75, 3.75), (3.75, 3.75, 3.75)]
    assert (statistics.certificate, statistics.worst_certificate, statistics.tolerance) == (1.5, 3.75, 8.0)
    first.bind([None, None])
    assert alignedkv_compile.stats().certificate == 3.5
    del second, other


def test_devices_without_a_certified_kernel_are_refused_by_strict(steps: Any) -> None:
    with (
        inductor_config.patch(cpu_backend="triton"),
        pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="has generated C") as raised,
    ):
        certified(steps.static)(*steps.inputs(96).next())
    assert isinstance(raised.value.inner_exception, DeclinedError)


def test_a_lossless_cache(tiny_llama: Any) -> None:
    """Its planes are all that there is of it, and every bit is in them: checked by the shadow's decoding of them."""
    checks: list[Any] = []
    remove = alignedkv_compile.on_shadow(checks.append)
    prompt, tokens = torch.randint(0, 64, (1, LIVE)), torch.randint(0, 64, (3, 1, 1))
    cache = alignedkv_compile.Cache(tiny_llama.config, "lossless", CAPACITY)
    tiny_llama(input_ids=prompt, past_key_values=cache)
    options = {**CERTIFIED, "tolerance": 64.0, "shadow_every": 1}
    compiled = torch.compile(tiny_llama.forward, backend="alignedkv", options=options)
    for token in tokens:
        compiled(input_ids=token, past_key_values=cache)
    remove()
    statistics = alignedkv_compile.stats()
    assert statistics.fraction < 1
    assert statistics.worst_certificate is not None
    assert 0 < statistics.worst_certificate <= 64.0 * (1 + 2.0**-23)
    assert len(checks) == len(tokens)
    assert all(set(check.errors) == {0, 1} for check in checks)
    assert all(0 < 64.0 * check.worst <= statistics.worst_certificate for check in checks)


def test_a_cache_of_few_bits_is_declined(tiny_llama: Any) -> None:
    cache = alignedkv_compile.Cache(tiny_llama.config, "8bit", CAPACITY)
    tiny_llama(input_ids=torch.randint(0, 64, (1, LIVE)), past_key_values=cache)
    compiled = torch.compile(tiny_llama.forward, backend="alignedkv", options=CERTIFIED)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="a cache of few bits has none left") as raised:
        compiled(input_ids=torch.zeros(1, 1, dtype=torch.int64), past_key_values=cache)
    assert isinstance(raised.value.inner_exception, DeclinedError)
