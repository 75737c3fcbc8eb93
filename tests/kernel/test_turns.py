"""Heads that need many bytes are read at all bits for some calls; how many, generated C++ keeps with the planes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import Case, Result, keyed_caches, make_case, run_kernel, run_write, without_planes, write_planes

from alignedkv_compile import ops
from alignedkv_compile.layout import LONGEST_WAIT, TURNS_BYTES, arena_layout

SHARE = 0.5
PEAKED, BROAD = 0, 1


@pytest.fixture
def case() -> Case:
    """Two heads, of which the second looks at half of its rows."""
    case = make_case(heads=2, group=3, rows=1024, peak=1.0)
    case.query[:, :3] *= 6
    case.query[:, 3:] *= 0.7
    return case


def turns_of(case: Case, planes: torch.Tensor) -> torch.Tensor:
    """int32 ``[heads, 2]``."""
    layout = arena_layout(case.key, case.value)
    return planes.narrow(0, layout.turns, layout.heads * TURNS_BYTES).view(torch.int32).view(layout.heads, 2)


def compiled_read(share: float) -> Callable[..., torch.Tensor]:
    def attention(*arguments: object) -> torch.Tensor:
        return ops.aligned_read_attention.counted(*arguments, break_even=share)

    return torch.compile(attention, fullgraph=True)


def read(call: Callable[..., torch.Tensor], case: Case, planes: torch.Tensor) -> Result:
    counters = torch.zeros(1, len(ops.COUNTER_FIELDS), dtype=torch.int64)
    with keyed_caches():
        output = call(*case.arguments(planes), counters, 0)
    return Result(output, dict(zip(ops.COUNTER_FIELDS, counters[0].tolist(), strict=True)))


def test_a_head_that_takes_many_bytes_waits_for_longer_each_time(case: Case) -> None:
    planes = write_planes(case)
    few, every = run_kernel(case, planes), run_kernel(without_planes(case), planes)
    call = compiled_read(SHARE)
    tried, left = [], 0
    for number in range(80):
        result = read(call, case, planes)
        is_tried = left == 0
        if is_tried:
            tried.append(number)
        broad = slice(3, 6)
        torch.testing.assert_close(result.output[:, broad], (few if is_tried else every).output[:, broad], rtol=0, atol=2e-6)
        torch.testing.assert_close(result.output[:, :3], few.output[:, :3], rtol=0, atol=2e-6)
        assert (result.counts["bytes_read"] == few.counts["bytes_read"]) is is_tried
        assert result.counts["rows"] == 2 * 1024
        left = int(turns_of(case, planes)[BROAD, 0])
        assert turns_of(case, planes)[PEAKED].tolist() == [0, 0]
    assert tried == [0, 2, 6, 14, 30, 62], "after 1, 3, 7, 15 and 31 calls"
    assert turns_of(case, planes)[BROAD, 1] == LONGEST_WAIT


def test_a_head_that_takes_few_bytes_again_starts_over(case: Case) -> None:
    planes = write_planes(case)
    call = compiled_read(SHARE)
    turns = turns_of(case, planes)
    turns[BROAD] = torch.tensor([0, LONGEST_WAIT])
    case.query[:, 3:] *= 9
    read(call, case, planes)
    assert turns[BROAD].tolist() == [0, 0]


def test_calls_that_read_every_bit_in_any_case_do_not_count(case: Case) -> None:
    planes = write_planes(case)
    call = compiled_read(SHARE)
    turns = turns_of(case, planes)
    case.query[0, 4, 0, 5] = torch.nan
    read(call, case, planes)
    assert not turns.any()
    short = make_case(heads=2, group=3, rows=1024, min_context=1025)
    read(call, short, planes)
    assert not turns.any()


def test_rows_from_the_first_on_are_another_text(case: Case) -> None:
    planes = write_planes(case)
    turns = turns_of(case, planes)
    turns[:] = 7
    rows = slice(5, 9)
    run_write(planes, case.key[:, :, rows], case.value[:, :, rows], torch.arange(5, 9), 1024)
    assert (turns == 7).all()
    rows = slice(0, 9)
    run_write(planes, case.key[:, :, rows], case.value[:, :, rows], torch.arange(9), 1024)
    assert not turns.any()


def test_without_a_share_nothing_is_kept(case: Case) -> None:
    planes = write_planes(case)
    turns = turns_of(case, planes)
    turns[BROAD] = 3
    first, second = (read(compiled_read(share), case, planes).counts["bytes_read"] for share in (0.0, SHARE))
    assert first < second, "only the second lets the head wait"
    assert turns.tolist() == [[0, 0], [2, 3]]


def test_the_reference_reads_few_bits_in_every_call(case: Case) -> None:
    planes = write_planes(case)
    turns = turns_of(case, planes)
    turns[:] = 3
    counters = torch.zeros(1, len(ops.COUNTER_FIELDS), dtype=torch.int64)
    given = ops.aligned_read_attention.counted(*case.arguments(planes), counters, 0, break_even=SHARE)
    assert torch.equal(given, ops.aligned_read_attention.default(*case.arguments(planes), break_even=SHARE))
    assert torch.equal(given, ops.aligned_read_attention.default(*case.arguments(planes)))
    assert (turns == 3).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_teams_agree_on_their_heads_turn(case: Case, threads: int) -> None:
    """With three threads, two of them share a head."""
    planes = write_planes(case)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch._inductor.config.patch({"cpp.threads": threads}):
            call = compiled_read(SHARE)
            for _ in range(3):
                read(call, case, planes)
    finally:
        torch.set_num_threads(before)
    assert turns_of(case, planes).tolist() == [[0, 0], [3, 3]]
