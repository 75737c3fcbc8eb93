"""The operators as torch sees them: schemas, fakes, declared mutation; and caches beyond 2^31 bytes."""

from __future__ import annotations

import pytest
import torch
from cases import exact, make_case, relative_errors, run_kernel, run_write, write_planes
from torch import library

from alignedkv_compile import arena, lowering, ops
from alignedkv_compile.layout import arena_layout


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("certified", [False, True])
def test_attention_passes_opcheck(masked: bool, counted: bool, certified: bool) -> None:
    mask = torch.ones(1, 1, 2, 140, dtype=torch.bool) if masked else None
    case = make_case(rows=140, query_rows=2, mask=mask)
    bounds, counters = torch.zeros(2, 2, 6), torch.zeros(2, len(ops.COUNTER_FIELDS), dtype=torch.int64)
    recorded = [bounds] * certified + [counters] * counted
    operator = ops.certified_read_attention if certified else ops.aligned_read_attention
    overload = operator.counted if counted else operator.default
    library.opcheck(overload, (*case.arguments(write_planes(case)), *recorded, *[1] * bool(recorded)))


def test_write_passes_opcheck() -> None:
    case = make_case(rows=40)
    planes = torch.zeros(arena_layout(case.key, case.value).total, dtype=torch.uint8)
    library.opcheck(ops.quantize_on_write.default, (planes, case.key, case.value, torch.arange(40), 40))


def test_one_tensor_as_key_and_value() -> None:
    """Multi-latent models cache one tensor and read it twice."""
    case = make_case(rows=300)
    shared = type(case)(case.query, case.key, case.key)
    result = run_kernel(shared, write_planes(shared))
    assert relative_errors(result.output, exact(shared)).max() <= 6 * shared.tolerance * 0.4247 * shared.roundoff


@pytest.mark.slow
def test_a_cache_of_more_than_two_gib() -> None:
    """Rows whose byte offsets do not fit in 32 bits; the pages before them are never touched."""
    rows, live = 2**31 // 256 + 1000, 600
    small = make_case(heads=1, group=2, rows=live, key_dim=128)
    key = torch.zeros(1, 1, rows, 128, dtype=torch.bfloat16)
    value = torch.zeros_like(key)
    positions = torch.arange(rows - live, rows)
    key[:, :, positions] = small.key
    value[:, :, positions] = small.value
    planes = torch.zeros(arena_layout(key, value).total, dtype=torch.uint8)
    run_write(planes, small.key, small.value, positions, rows)
    arena.mark(planes, valid=True)
    mask = torch.zeros(1, 1, 1, rows, dtype=torch.bool)
    mask[..., positions] = True
    large = type(small)(small.query, key, value, mask)
    result = run_kernel(large, planes)
    assert relative_errors(result.output, exact(small)).max() <= 6 * small.tolerance * 0.4247 * small.roundoff
    assert result.counts["rows"] == live
    assert result.counts["bytes_read"] < result.counts["bytes_full"]


def test_our_lowerings_replace_inductors_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor makes a fallback of an operator that it meets before the lowerings are registered."""
    from torch._inductor.lowering import lowerings

    lowering.register()
    for overload in (ops.quantize_on_write.default, ops.aligned_read_attention.default):
        monkeypatch.setitem(lowerings, overload, "a fallback")
    lowering.register.cache_clear()
    lowering.register()
    assert all(callable(lowerings[each]) for each in (ops.quantize_on_write.default, ops.aligned_read_attention.default))
