"""The backend on single steps: which graphs it changes, what it refuses and says, and that state survives from call to call."""

from __future__ import annotations

import gc
import logging
import re
import threading
import weakref
from typing import Any

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import alignedkv_compile
from alignedkv_compile import DeclinedError, StatisticsDisabledError, passes, torch_private
from alignedkv_compile.ops import COUNTER_FIELDS
from alignedkv_compile.runtime import STORES
from alignedkv_compile.state.append_buffers import AppendBuffers
from alignedkv_compile.state.sidecar import MAX_CONSECUTIVE_REBUILDS, NO_VERSION_COUNTER, REBUILT_TOO_OFTEN, SidecarStore
from alignedkv_compile.storage import EIGHT_BIT, LOSSLESS
from alignedkv_compile.torch_private import inductor_config

pytestmark = pytest.mark.usefixtures("no_grad")

FP32 = {"rtol": 1e-5, "atol": 1e-5}


def compile_step(function: Any, **options: Any) -> Any:
    return torch.compile(function, backend="alignedkv", fullgraph=True, options={"tolerance": 0.0, **options})


def compare_static(compiled: Any, steps: Any, inputs: Any, count: int, rows: int = 1) -> None:
    """Run steps beside stock eager on copies of the caches; outputs and caches must agree."""
    keys, values = inputs.keys.clone(), inputs.values.clone()
    for _ in range(count):
        args = inputs.next(rows)
        expected = steps.static(*args[:3], keys, values, *args[5:])
        torch.testing.assert_close(compiled(*args), expected, **FP32)
        assert torch.equal(inputs.keys, keys)
        assert torch.equal(inputs.values, values)


@pytest.mark.slow
def test_a_graph_without_attention_is_plain_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    returned = []
    compile_graph = torch_private.compile_graph

    def spy(*args: Any, **kwargs: Any) -> Any:
        assert len(args) == 3, "no cache key of ours: such a graph shares cache entries with stock Inductor"
        returned.append(compile_graph(*args, **kwargs))
        return returned[-1]

    monkeypatch.setattr(torch_private, "compile_graph", spy)
    compiled = torch.compile(lambda x: (x * 2).relu(), backend="alignedkv")
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))
    assert len(returned) == 1
    report = alignedkv_compile.report()
    assert (report.found, len(report.graphs)) == (0, 1)
    assert "no attention over a KV cache" in str(report)


@pytest.mark.parametrize("dynamic", [None, False, True])
@pytest.mark.parametrize("tolerance", [0.0, 2.0])
def test_static_steps(steps: Any, dynamic: bool | None, tolerance: float) -> None:
    options = {"tolerance": tolerance, "strict": True}
    compiled = torch.compile(steps.static, backend="alignedkv", fullgraph=True, dynamic=dynamic, options=options)
    compare_static(compiled, steps, steps.inputs(96), 5)
    report = alignedkv_compile.report()
    assert report.found == report.rewritten == 1


def test_a_kernel_defines_nothing_beside_its_entry(steps: Any) -> None:
    """With Inductor's C++ wrapper all kernels of a graph stand in one file; the test after this one compiles such a file."""
    compiled = compile_step(steps.static, tolerance=2.0, min_context=0, inductor={"fx_graph_cache": False})
    _, modules = run_and_get_code(compiled, *steps.inputs(96).next())
    found = (text for code in modules for text in re.findall(r"cpp_pybinding\(.*?\'\'\'(.*?)\'\'\'", code, re.DOTALL))
    kernels = {text for text in found if "kernel_parts" in text}
    assert len(kernels) >= 2, "a write and a read"
    for kernel in kernels:
        parts = re.compile(
            r"^namespace kernel_parts \{ namespace \{\n.*^\} \}  // namespace kernel_parts\n", re.DOTALL | re.MULTILINE
        )
        before = parts.sub("", kernel).partition('extern "C"')[0]
        assert all(not line or line.startswith("#include") for line in before.splitlines())


@pytest.mark.slow
def test_all_kernels_of_a_graph_in_one_file(steps: Any) -> None:
    """As with Inductor's C++ wrapper: what they are made of has the same names, and its sizes differ."""

    def two_layers(wide: Any, narrow: Any) -> tuple[torch.Tensor, torch.Tensor]:
        query, key, value, *rest = narrow
        return steps.static(*wide), steps.static(query, key, value[..., :8], *rest)

    inductor = {"cpp_wrapper": True, "cpp_cache_precompile_headers": False}  # one graph: nothing to share
    compiled = compile_step(two_layers, tolerance=2.0, min_context=0, inductor=inductor, strict=True)
    wide, narrow = steps.inputs(96), steps.inputs(64)
    narrow.values = narrow.values[..., :8].clone()
    for _ in range(3):
        arguments = wide.next(), narrow.next()
        expected = two_layers(*(tuple(tensor.clone() for tensor in one) for one in arguments))
        for actual, stock in zip(compiled(*arguments), expected, strict=True):
            torch.testing.assert_close(actual, stock, rtol=0, atol=1e-5)
    report = alignedkv_compile.report()
    assert report.found == report.rewritten == 2
    assert not report.graphs[0].fallback, "stock Inductor took the graph"


@pytest.mark.parametrize("tolerance", [0.0, 2.0])
def test_one_graph_for_all_query_lengths(steps: Any, tolerance: float) -> None:
    compiled = compile_step(steps.static, tolerance=tolerance, strict=True)
    inputs = steps.inputs(96)
    for rows in (3, 5, 2, 16, 17):
        compare_static(compiled, steps, inputs, 1, rows)
    report = alignedkv_compile.report()
    assert (len(report.graphs), report.found, report.rewritten) == (2, 2, 1)


def test_one_graph_serves_two_caches_with_planes_of_their_own(steps: Any) -> None:
    compiled = compile_step(steps.static, tolerance=2.0, min_context=0)
    caches = [steps.inputs(96), steps.inputs(96)]
    before = len(STORES.of(SidecarStore))
    for _ in range(3):
        for inputs in caches:
            compare_static(compiled, steps, inputs, 1)
    assert len(STORES.of(SidecarStore)) == before + 2
    assert len(alignedkv_compile.report().graphs) == 1
    del caches, inputs
    gc.collect()
    assert len(STORES.of(SidecarStore)) == before


def test_prefill_then_decode_then_an_eager_write(steps: Any) -> None:
    compiled = compile_step(steps.static, tolerance=2.0, min_context=0)
    inputs = steps.inputs(128)
    compare_static(compiled, steps, inputs, 1, rows=40)
    compare_static(compiled, steps, inputs, 3)
    inputs.keys[:, :, :20] = 7.0
    compare_static(compiled, steps, inputs, 3)
    inputs.keys.zero_()
    inputs.values.zero_()
    inputs.length = 0
    compare_static(compiled, steps, inputs, 3)
    report = alignedkv_compile.report()
    assert report.found == report.rewritten + report.prefill + report.declined
    assert report.prefill == 1


def test_dynamic_steps_never_copy_the_cache_again(steps: Any) -> None:
    compiled = compile_step(steps.dynamic, tolerance=2.0, strict=True)
    keys, values = torch.randn(1, steps.kv_heads, 30, steps.head_dim), torch.randn(1, steps.kv_heads, 30, steps.head_dim)
    expected_keys, expected_values = keys, values
    addresses = []
    for _ in range(6):
        query, key, value = (
            torch.randn(1, heads, 1, steps.head_dim) for heads in (steps.heads, steps.kv_heads, steps.kv_heads)
        )
        expected, expected_keys, expected_values = steps.dynamic(query, key, value, expected_keys, expected_values)
        output, keys, values = compiled(query, key, value, keys, values)
        torch.testing.assert_close(output, expected, **FP32)
        assert torch.equal(keys, expected_keys)
        assert torch.equal(values, expected_values)
        addresses.append(keys.data_ptr())
    assert len(set(addresses)) == 1
    before = len(STORES.of(AppendBuffers))
    buffer = weakref.ref(keys._base)
    del keys, values
    gc.collect()
    assert len(STORES.of(AppendBuffers)) == before - 1
    assert buffer() is None


def test_growing_past_the_buffer_does_not_recompile_again(steps: Any) -> None:
    compiled = compile_step(steps.dynamic, tolerance=0.0)
    shape = (1, steps.kv_heads, 3, steps.head_dim)
    keys, values = torch.randn(shape), torch.randn(shape)
    expected_keys = keys
    for step in range(12):
        query, key = torch.randn(1, steps.heads, 8, steps.head_dim), torch.randn(1, steps.kv_heads, 8, steps.head_dim)
        if step == 4:
            graphs = len(alignedkv_compile.report().graphs)
            capacity = keys._base.shape[2]
            # four steps have seen a foreign past and a buffer's view; fill the buffer, so that the next steps outgrow it
            pad = torch.randn(1, steps.kv_heads, 8, steps.head_dim)
            while keys.shape[2] + 8 <= capacity:
                _, keys, values = compiled(query, pad, pad, keys, values)
                expected_keys = torch.cat([expected_keys, pad], 2)
        _, keys, values = compiled(query, key, key, keys, values)
        expected_keys = torch.cat([expected_keys, key], 2)
        assert torch.equal(keys, expected_keys)
    assert keys._base.shape[2] > capacity
    assert len(alignedkv_compile.report().graphs) <= graphs + 1


def test_a_declined_site_is_stock_and_says_why(steps: Any) -> None:
    compiled = compile_step(steps.declined)
    inputs = steps.inputs(96)
    args = inputs.next()
    keys, values = inputs.keys.clone(), inputs.values.clone()
    expected = steps.declined(*args[:3], keys, values, *args[5:])
    torch.testing.assert_close(compiled(*args), expected, **FP32)
    report = alignedkv_compile.report()
    assert (report.found, report.declined, report.rewritten) == (1, 1, 0)
    assert report.graphs[0].sites[0].reason
    assert report.graphs[0].sites[0].reason in str(report)


def test_strict_raises_with_the_reasons(steps: Any) -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as raised:
        compile_step(steps.declined, strict=True)(*steps.inputs(96).next())
    error = raised.value.inner_exception
    assert isinstance(error, DeclinedError)
    assert len(error.sites) == 1
    site = alignedkv_compile.report().graphs[0].sites[0]
    assert site.reason in error.sites[0]
    assert site.kind is not None
    assert f"docs/declined.md#{site.kind.value}" in str(error)


def test_gradients_are_declined_not_broken(steps: Any) -> None:
    compiled = torch.compile(steps.dynamic, backend="alignedkv")
    with torch.enable_grad():
        query = torch.randn(1, 4, 1, 16, requires_grad=True)
        rows = torch.randn(1, 2, 1, 16)
        compiled(query, rows, rows, torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16))[0].sum().backward()
    assert query.grad is not None
    report = alignedkv_compile.report()
    assert report.declined == 1
    assert "grad" in report.graphs[0].sites[0].reason


@pytest.mark.parametrize("stage", ["rewrite", "compile"])
def test_an_internal_error_falls_back_visibly(
    steps: Any, stage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("a defect")

    compile_graph = torch_private.compile_graph
    if stage == "rewrite":
        monkeypatch.setattr(passes, "rewrite_graph", broken)
    else:
        monkeypatch.setattr(torch_private, "compile_graph", lambda *a: broken() if len(a) > 3 else compile_graph(*a))
    with caplog.at_level(logging.WARNING, "alignedkv_compile"):
        compare_static(compile_step(steps.static), steps, steps.inputs(96), 2)
    assert "a defect" in caplog.text
    report = alignedkv_compile.report()
    assert "ZeroDivisionError: a defect" in report.graphs[0].fallback
    assert "ZeroDivisionError: a defect" in str(report)
    assert report.rewritten == 0
    assert report.found == report.declined
    torch._dynamo.reset()
    with pytest.raises(Exception, match="a defect"):
        compile_step(steps.static, strict=True)(*steps.inputs(96).next())


def test_inference_mode(steps: Any) -> None:
    with torch.inference_mode():
        compiled = compile_step(steps.static, tolerance=2.0, min_context=0, stats=True)
        compare_static(compiled, steps, steps.inputs(96), 3)
        report = alignedkv_compile.report()
        assert (report.rewritten, report.declined) == (1, 0)
        assert alignedkv_compile.stats().fraction == 1.0, "every bit is read, and no more"
        assert NO_VERSION_COUNTER in report.graphs[0].notes
        assert NO_VERSION_COUNTER in str(alignedkv_compile.report())
        trusting = compile_step(steps.static, tolerance=2.0, assume_exclusive_cache=True)
        alignedkv_compile.reset_report()
        compare_static(trusting, steps, steps.inputs(96), 3)
        assert not any(graph.notes for graph in alignedkv_compile.report().graphs)


def test_repeated_eager_writes_are_reported(steps: Any) -> None:
    compiled, inputs = compile_step(steps.static, tolerance=2.0, min_context=0), steps.inputs(96)
    for _ in range(MAX_CONSECUTIVE_REBUILDS + 2):
        inputs.keys.mul_(1.5)
        compare_static(compiled, steps, inputs, 1)
    assert alignedkv_compile.report().graphs[0].notes == {REBUILT_TOO_OFTEN: 2}


def test_a_call_that_raises_leaves_stale_planes(steps: Any) -> None:
    compiled, inputs = compile_step(steps.static, tolerance=2.0, min_context=0), steps.inputs(96)
    compare_static(compiled, steps, inputs, 2)
    args = list(inputs.next())
    args[5] = torch.tensor([1000])  # outside of the cache
    with pytest.raises((IndexError, RuntimeError)):
        compiled(*args)
    sidecar = STORES.of(SidecarStore).before_call(inputs.keys, inputs.values)
    assert sidecar.history.rebuilds > 0
    inputs.length -= 1
    compare_static(compiled, steps, inputs, 2)


def test_statistics(steps: Any) -> None:
    with pytest.raises(StatisticsDisabledError, match="'stats': True"):
        alignedkv_compile.stats()
    compiled, inputs = compile_step(steps.static, stats=True), steps.inputs(96)
    compare_static(compiled, steps, inputs, 3)
    statistics = alignedkv_compile.stats()
    assert len(statistics.layers) == 1
    assert statistics.calls == 3
    assert statistics.bytes_full == 3 * 0 + sum(2 * steps.kv_heads * length * steps.head_dim * 4 for length in (1, 2, 3))
    assert statistics.fraction == statistics.layers[0].fraction == 1.0
    assert set(COUNTER_FIELDS) < set(statistics.to_dict())
    assert "100.0%" in str(statistics)
    alignedkv_compile.reset_stats()
    assert alignedkv_compile.stats().bytes_full == 0


def test_report_is_plain_data_and_rich(steps: Any) -> None:
    import json

    from rich.console import Console

    compare_static(compile_step(steps.static), steps, steps.inputs(96), 1)
    report = alignedkv_compile.report()
    data = json.loads(json.dumps(report.to_dict()))
    assert (data["found"], data["rewritten"], data["declined"], data["prefill"]) == (1, 1, 0, 0)
    assert data["graphs"][0]["sites"][0]["outcome"] == "rewritten"
    console = Console(width=200, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(report)
    assert "1 rewritten" in capture.get()
    alignedkv_compile.reset_report()
    assert "no graph has been compiled" in str(alignedkv_compile.report())


def test_threads_with_models_of_their_own(steps: Any) -> None:
    compiled = compile_step(steps.static, tolerance=2.0, min_context=0)
    compare_static(compiled, steps, steps.inputs(96), 1)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with torch.no_grad():
                compare_static(compiled, steps, steps.inputs(96), 10)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_number_of_cpu_threads_may_change(steps: Any) -> None:
    compiled, inputs, count = (
        compile_step(steps.static, tolerance=2.0, min_context=0),
        steps.inputs(96),
        torch.get_num_threads(),
    )
    try:
        for threads in (1, 2, 4, 1):
            torch.set_num_threads(threads)
            compare_static(compiled, steps, inputs, 3)
    finally:
        torch.set_num_threads(count)


def test_foreign_passes_in_the_inductor_slot_are_kept(steps: Any) -> None:
    seen = []

    class Spy(torch._inductor.custom_graph_pass.CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            seen.append(len(graph.nodes))

        def uuid(self) -> bytes:
            return b"spy"

    spy = Spy()
    with torch._inductor.config.patch(post_grad_custom_post_pass=spy):
        compare_static(compile_step(steps.static), steps, steps.inputs(96), 1)
        assert torch._inductor.config.post_grad_custom_post_pass is spy
    assert len(seen) == 1
    torch._dynamo.reset()
    compare_static(compile_step(steps.static, inductor={"post_grad_custom_post_pass": spy}), steps, steps.inputs(97), 1)
    assert len(seen) == 2


def test_reasons_are_grouped_and_explained(steps: Any) -> None:
    compile_step(steps.declined)(*steps.inputs(96).next())
    torch._dynamo.reset()
    compile_step(steps.declined)(*steps.inputs(97).next())
    report = alignedkv_compile.report()
    ((kind, met),) = report.reasons
    assert report.reasons[kind, met] == 2
    assert f"2 x [{kind.value}] {met}" in str(report)
    assert report.to_dict()["graphs"][0]["sites"][0]["kind"] == kind.value  # type: ignore[index]


@pytest.mark.parametrize(
    ("dtype", "device", "hip", "expected"),
    [
        (torch.bfloat16, "cuda", None, True),
        (torch.bfloat16, "cuda", "6.4", True),
        (torch.bfloat16, "xpu", None, True),
        (torch.float16, "cuda", None, True),
        (torch.float16, "cuda", "6.4", False),
        (torch.float16, "xpu", None, False),
        (torch.float32, "cuda", None, False),
    ],
)
def test_which_gpus_read_lossless_rows(
    dtype: torch.dtype, device: str, hip: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    assert LOSSLESS.has_triton(dtype, torch.device(device)) is expected
    assert EIGHT_BIT.has_triton(dtype, torch.device(device))


def test_lossless_rows_that_no_kernel_reads_are_declined(tiny_llama: Any) -> None:
    cache = alignedkv_compile.Cache(tiny_llama.config, "lossless", 64)
    tiny_llama(input_ids=torch.zeros(1, 20, dtype=torch.int64), past_key_values=cache)
    compiled = torch.compile(tiny_llama.forward, backend="alignedkv", options={"strict": True})
    reason = "no kernel for cpu reads lossless rows of torch.float32"
    with (
        inductor_config.patch(cpu_backend="triton"),
        pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=reason) as raised,
    ):
        compiled(input_ids=torch.zeros(1, 1, dtype=torch.int64), past_key_values=cache)
    assert isinstance(raised.value.inner_exception, DeclinedError)
