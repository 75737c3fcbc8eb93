"""The stream by matrix tiles: bfloat16 caches and queries, of enough query rows, where the target is AMX."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import SUM_ERROR, Case, exact, make_case, run_kernel, without_planes, write_planes

from alignedkv_compile.lowering.attention import ReadAttention
from alignedkv_compile.lowering.isa import LEAST_TILED_ROWS


def bfloat16_case(**fields: object) -> Case:
    return without_planes(make_case(**{"group": 6, "query_dtype": torch.bfloat16} | fields))  # type: ignore[arg-type]


def assert_rounded(case: Case, output: torch.Tensor, expected: torch.Tensor | None = None) -> None:
    """The output is the exact one, or one off by no more than a float32 attention, rounded to its dtype once."""
    expected = exact(case) if expected is None else expected
    error = 16 * SUM_ERROR * expected.abs().amax()
    assert ((expected - error).to(output.dtype) <= output).all()
    assert (output <= (expected + error).to(output.dtype)).all()


@pytest.mark.parametrize(
    "shape",
    [
        {"group": LEAST_TILED_ROWS, "rows": 1000},
        {"group": 4, "query_rows": 2, "rows": 64},
        {"group": 9, "rows": 577, "key_dim": 32, "value_dim": 96},  # 18 terms: two tiles of them
        {"group": 17, "rows": 640, "key_dim": 96, "value_dim": 32},  # and two of query rows
        pytest.param({"group": 4, "query_rows": 16, "rows": 700, "key_dim": 128}, marks=pytest.mark.slow),
        pytest.param({"group": 8, "rows": 700, "key_dim": 256}, marks=pytest.mark.slow),
        pytest.param({"group": 6, "rows": 129, "batch": 2, "peak": 6.0}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_it_is_plain_attention(amx: str, shape: dict[str, object]) -> None:
    case = bfloat16_case(**shape)
    result = run_kernel(case, None)
    assert_rounded(case, result.output)
    assert result.counts["bytes_read"] == result.counts["bytes_full"]


def test_scores_that_rise(amx: str) -> None:
    """Each step finds a larger score than all before, by much: what was summed is scaled down."""
    case = bfloat16_case(rows=900, peak=1.0)
    case.key[:] = case.query[:, ::6] / case.query[:, ::6].norm(dim=-1, keepdim=True) * torch.linspace(0, 40, 900)[:, None]
    assert_rounded(case, run_kernel(case, None).output)


@pytest.mark.parametrize("mask", ["causal", "window", "padded"])
def test_masks_leave_whole_steps_and_others(amx: str, mask: str) -> None:
    rows, queries = 512, 4
    positions, last = torch.arange(rows), torch.arange(rows - queries, rows)[:, None]
    allowed = {
        "causal": positions <= last,
        "window": (positions <= last) & (positions > last - 300),
        "padded": (positions <= last) & (positions >= 70),
    }[mask]
    case = bfloat16_case(group=2, query_rows=queries, rows=rows, mask=allowed[None, None])
    assert_rounded(case, run_kernel(case, None).output)


def test_a_bias_a_cap_and_a_sink(amx: str) -> None:
    bias = torch.randn(1, 12, 1, 700, generator=torch.Generator().manual_seed(1)).bfloat16()
    case = bfloat16_case(rows=700, mask=bias, softcap=20.0, sinks=torch.linspace(-1, 3, 12))
    assert_rounded(case, run_kernel(case, None).output)


@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_nan_and_inf(amx: str, where: str, number: float) -> None:
    """Of Inf comes Inf, though the second term of a weight may be zero."""
    case = bfloat16_case(rows=300)
    getattr(case, where)[0, 0, 100, 5] = number
    expected, output = exact(case), run_kernel(case, None).output
    finite = expected.isfinite()
    assert not finite.all()
    assert torch.equal(output.double().nan_to_num(0.0, 1.0, -1.0)[~finite], expected.nan_to_num(0.0, 1.0, -1.0)[~finite])
    assert torch.equal(output.isfinite(), finite)
    assert_rounded(case, output.where(finite, 0), expected.where(finite, 0))


def test_a_length_within_the_buffer(amx: str) -> None:
    """Rows past the length may hold anything."""
    case = bfloat16_case(rows=640)
    case.key[:, :, 300:] = torch.nan
    case.value[:, :, 300:] = torch.nan
    for length in (1, 63, 64, 65, 300):
        short = replace(case, length=length)
        assert_rounded(short, run_kernel(short, None).output)


def test_strided_caches(amx: str) -> None:
    """Rows apart in memory, as in a cache of ``[batch, rows, heads, dim]``, and a transposed query."""
    case = bfloat16_case(rows=400)
    key, value = (cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in (case.key, case.value))
    query = case.query.transpose(1, 3).contiguous().transpose(1, 3)
    assert_rounded(case, run_kernel(replace(case, query=query, key=key, value=value), None).output)


def test_a_read_of_planes_streams_with_it(amx: str) -> None:
    """Where planes say nothing."""
    case = replace(bfloat16_case(rows=700), tolerance=2.0)
    assert_rounded(case, run_kernel(case, write_planes(case, valid=False)).output)


def test_a_process_that_may_not_have_tiles(amx_denied: str) -> None:
    case = bfloat16_case(rows=300)
    assert_rounded(case, run_kernel(case, None).output)


@pytest.mark.parametrize(
    ("shape", "tiled"),
    [
        ({"group": LEAST_TILED_ROWS}, True),
        ({"group": 2, "query_rows": 3}, True),
        ({"group": LEAST_TILED_ROWS - 1}, False),
        ({"dtype": torch.float16}, False),
        ({"query_dtype": torch.float32}, False),
        ({"key_dim": 40}, False),
    ],
    ids=str,
)
def test_which_reads_are_by_tiles(amx: str, shape: dict[str, object], tiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of few query rows, other dtypes, other dimensions: these have the same kernel as for AVX-512."""
    sources: list[str] = []
    original = ReadAttention.source

    def recorded(self: ReadAttention, *arguments: Any) -> str:
        sources.append(original(self, *arguments))
        return sources[-1]

    monkeypatch.setattr(ReadAttention, "source", recorded)
    case = bfloat16_case(**{"rows": 200, **shape})
    with torch._inductor.config.patch(force_disable_caches=True):
        assert_rounded(case, run_kernel(case, None).output)
    assert sources
    assert all(("TiledStream" in source) is tiled for source in sources)
