"""Growing buffers: always the values of ``cat``, a copy only where it is needed, and old views that never change."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignedkv_compile.errors import CacheLengthError
from alignedkv_compile.layout import PLANES_STALE, PLANES_VALID
from alignedkv_compile.state.append_buffers import (
    EXCHANGED_TOO_OFTEN,
    SPARE_BYTES,
    SPARE_ROWS,
    AppendBuffer,
    AppendBuffers,
    PastHistory,
    grown_capacity,
)
from alignedkv_compile.state.copies import MAX_CONSECUTIVE_COPIES

Pair = tuple[torch.Tensor, torch.Tensor]


class CountingBuilder:
    """Counts plane rebuilds; the arena remembers how many rows it was built for."""

    def __init__(self) -> None:
        self.rebuilds = 0

    def rebuild(self, planes: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: int) -> None:
        self.rebuilds += 1
        planes.zero_()
        planes[:8].view(torch.int64).fill_(PLANES_VALID)


def rows(count: int, batch: int = 1) -> Pair:
    return torch.randn(batch, 2, count, 16), torch.randn(batch, 2, count, 8)


def append(
    buffers: AppendBuffers, past: Pair, new: Pair, with_planes: bool = True, history: PastHistory | None = None
) -> tuple[Pair, AppendBuffer]:
    """What the runtime and the compiled graph do for one layer."""
    buffer = buffers.before_call(*past, new[0].shape[2], with_planes=with_planes, history=history)
    positions = torch.arange(new[0].shape[2]) + buffer.length
    buffer.key.index_copy_(2, positions, new[0])
    buffer.value.index_copy_(2, positions, new[1])
    return buffers.after_call(buffer, new[0].shape[2]), buffer


def cat(past: Pair, new: Pair) -> Pair:
    return torch.cat([past[0], new[0]], -2), torch.cat([past[1], new[1]], -2)


def assert_same(result: Pair, expected: Pair) -> None:
    for ours, theirs in zip(result, expected, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.fixture
def builder() -> CountingBuilder:
    return CountingBuilder()


@pytest.fixture
def buffers(builder: CountingBuilder) -> AppendBuffers:
    return AppendBuffers(builder)  # type: ignore[arg-type]


def header(buffer: AppendBuffer) -> int:
    assert buffer.planes is not None
    return int(buffer.planes[:8].view(torch.int64))


def test_a_cache_that_is_exchanged_between_all_calls_gets_no_planes(buffers: AppendBuffers, builder: CountingBuilder) -> None:
    """Beam search reorders the cache at every token: planes would be made for one read."""
    past, history = rows(5, batch=2), PastHistory()
    expected = past
    for step in range(MAX_CONSECUTIVE_COPIES + 5):
        new = rows(1, batch=2)
        past, buffer = append(buffers, past, new, history=history)
        expected = cat(expected, new)
        assert_same(past, expected)
        assert header(buffer) == (PLANES_VALID if step < MAX_CONSECUTIVE_COPIES else PLANES_STALE)
        past = past[0].flip(0), past[1].flip(0)
        expected = expected[0].flip(0), expected[1].flip(0)
    assert builder.rebuilds == MAX_CONSECUTIVE_COPIES
    assert history.note == EXCHANGED_TOO_OFTEN


def test_planes_come_back_when_the_cache_stays(buffers: AppendBuffers, builder: CountingBuilder) -> None:
    past, history = rows(5), PastHistory()
    for _ in range(MAX_CONSECUTIVE_COPIES + 1):
        past, buffer = append(buffers, (past[0] * 2, past[1]), rows(1), history=history)
    assert header(buffer) == PLANES_STALE
    for _ in range(3):
        past, buffer = append(buffers, past, rows(1), history=history)
        assert header(buffer) == PLANES_VALID
    assert builder.rebuilds == MAX_CONSECUTIVE_COPIES + 1
    assert history.note == ""


def test_growing_is_no_exchange(buffers: AppendBuffers) -> None:
    past, history = rows(5), PastHistory()
    for _ in range(10):
        past, buffer = append(buffers, past, rows(SPARE_ROWS), history=history)
        assert header(buffer) == PLANES_VALID


def test_the_last_view_is_continued_in_place(buffers: AppendBuffers, builder: CountingBuilder) -> None:
    past = expected = rows(5)
    addresses = set()
    for _ in range(100):
        new = rows(1)
        past, buffer = append(buffers, past, new)
        expected = cat(expected, new)
        addresses.add(buffer.key.data_ptr())
        assert_same(past, expected)
    assert len(addresses) == 1
    assert builder.rebuilds == 1
    assert len(buffers) == 1


def test_growth_is_amortised_and_old_views_keep_their_values(buffers: AppendBuffers, builder: CountingBuilder) -> None:
    past = expected = rows(1)
    held: list[tuple[Pair, Pair]] = []
    for _ in range(70):
        new = rows(16)
        past, _ = append(buffers, past, new)
        expected = cat(expected, new)
        held.append((past, expected))
    for view, values in held:
        assert_same(view, values)
    assert builder.rebuilds < 10
    assert len(buffers) == 1


@given(st.integers(0, 1 << 20), st.integers(1, 1 << 20))
def test_capacity_leaves_room_that_is_bounded(length: int, row_bytes: int) -> None:
    spare = grown_capacity(length, row_bytes) - length
    assert spare >= 1
    assert spare <= max(length * 0.25, 1, min(SPARE_ROWS, SPARE_BYTES / row_bytes))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("batch", "length"), [(1, 1024), (1, 1100), (1, 4096), (1, 9000), (8, 1024), (32, 1500)])
def test_what_a_long_cache_takes_in_all(buffers: AppendBuffers, head_dim: int, batch: int, length: int) -> None:
    """At most 1.9 times its live bytes with planes, measured at a buffer's making, when most of it is free."""
    past = tuple(torch.zeros(batch, 1, length, head_dim, dtype=torch.bfloat16) for _ in range(2))
    buffer = buffers.before_call(*past, 1, with_planes=True)
    assert buffer.planes is not None
    live = sum(tensor.nbytes for tensor in past)
    assert buffer.key.nbytes + buffer.value.nbytes + buffer.planes.nbytes <= 1.9 * live
    assert buffer.key.nbytes + buffer.value.nbytes <= 1.25 * live


def test_a_fork_is_copied(buffers: AppendBuffers) -> None:
    past, first = append(buffers, rows(5), rows(1))
    left, right = rows(1), rows(2)
    left_result, left_buffer = append(buffers, past, left)
    right_result, right_buffer = append(buffers, past, right)
    assert left_buffer is first
    assert right_buffer is not first
    assert_same(left_result, cat(past, left))
    assert_same(right_result, cat(past, right))
    for _ in range(3):
        new = rows(1)
        expected = cat(left_result, new), cat(right_result, new)
        (left_result, _), (right_result, _) = append(buffers, left_result, new), append(buffers, right_result, new)
        assert_same(left_result, expected[0])
        assert_same(right_result, expected[1])


@pytest.mark.parametrize(
    "change",
    [
        lambda past: (past[0][:, :, :-2], past[1][:, :, :-2]),
        lambda past: (past[0].index_select(0, torch.tensor([1, 0])), past[1].index_select(0, torch.tensor([1, 0]))),
        lambda past: (past[0][1:], past[1][1:]),
        lambda past: (past[0].clone(), past[1].clone()),
        lambda past: copy.deepcopy(past),
        lambda past: (past[0], past[1].clone()),
        lambda past: (past[0].clone(), past[1]),
        lambda past: (past[0].add_(1), past[1]),
        lambda past: (past[0], past[1].mul_(2)),
        lambda past: (past[0].view_as(past[0]), past[1]),
        lambda past: (past[0][:, :, :0], past[1][:, :, :0]),
    ],
    ids=[
        "crop",
        "reorder",
        "select",
        "clone",
        "deepcopy",
        "foreign value",
        "foreign key",
        "key edit",
        "value edit",
        "view",
        "empty",
    ],
)
def test_anything_else_is_copied(buffers: AppendBuffers, change: object) -> None:
    past, buffer = append(buffers, rows(5, batch=2), rows(1, batch=2))
    changed: Pair = change(past)  # type: ignore[operator]
    before = tuple(tensor.clone() for tensor in past)
    new = rows(1, batch=changed[0].shape[0])
    expected = cat(changed, new)
    result, fresh = append(buffers, changed, new)
    assert fresh is not buffer
    assert_same(result, expected)
    assert_same(past, before)  # type: ignore[arg-type]


def test_an_older_view_is_copied_and_does_not_disturb_the_newest(buffers: AppendBuffers) -> None:
    oldest, _ = append(buffers, rows(5), rows(1))
    middle, _ = append(buffers, oldest, rows(1))
    newest, _ = append(buffers, middle, rows(1))
    expected = tuple(tensor.clone() for tensor in newest)
    new = rows(1)
    result, _ = append(buffers, oldest, new)
    assert_same(result, cat(oldest, new))
    assert_same(newest, expected)  # type: ignore[arg-type]


def test_a_write_through_an_older_view_is_noticed(buffers: AppendBuffers) -> None:
    older, _ = append(buffers, rows(5), rows(1))
    newest, buffer = append(buffers, older, rows(1))
    older[0].add_(1)
    new = rows(1)
    result, fresh = append(buffers, newest, new)
    assert fresh is not buffer
    assert_same(result, cat(newest, new))


def test_keys_of_one_cache_with_values_of_another(buffers: AppendBuffers) -> None:
    first, _ = append(buffers, rows(5), rows(1))
    second, _ = append(buffers, rows(5), rows(1))
    mixed, new = (first[0], second[1]), rows(1)
    result, _ = append(buffers, mixed, new)
    assert_same(result, cat(mixed, new))


def test_pasts_of_different_lengths_are_an_error(buffers: AppendBuffers) -> None:
    with pytest.raises(CacheLengthError, match="5 rows but the past values have 4"):
        buffers.before_call(rows(5)[0], rows(4)[1], 1, with_planes=True)


def test_a_call_that_failed_does_not_leave_its_buffer_to_the_next(buffers: AppendBuffers) -> None:
    past, buffer = append(buffers, rows(5), rows(1))
    claimed = buffers.before_call(*past, 1, with_planes=True)
    claimed.key[:, :, 6] = float("nan")  # the graph wrote a row and raised
    new = rows(1)
    result, fresh = append(buffers, past, new)
    assert fresh is not buffer
    assert_same(result, cat(past, new))


def test_buffers_are_freed_with_the_last_view(buffers: AppendBuffers) -> None:
    past, buffer = append(buffers, rows(5), rows(1))
    freed = [weakref.ref(buffer.key), weakref.ref(buffer.planes)]
    del past, buffer
    gc.collect()
    assert [reference() for reference in freed] == [None, None]
    assert len(buffers) == 0


def test_a_graph_without_planes_makes_the_next_one_rebuild(buffers: AppendBuffers, builder: CountingBuilder) -> None:
    past, buffer = append(buffers, rows(5), rows(1), with_planes=False)
    assert buffer.planes is None
    assert builder.rebuilds == 0
    past, buffer = append(buffers, past, rows(1))
    assert builder.rebuilds == 1
    past, buffer = append(buffers, past, rows(1), with_planes=False)
    past, buffer = append(buffers, past, rows(1))
    assert builder.rebuilds == 2


def test_inside_inference_mode(buffers: AppendBuffers) -> None:
    with torch.inference_mode():
        past = expected = rows(5)
        buffer_addresses = set()
        for _ in range(4):
            new = rows(1)
            past, buffer = append(buffers, past, new)
            expected = cat(expected, new)
            buffer_addresses.add(buffer.key.data_ptr())
            assert_same(past, expected)
            assert not buffer.key.is_inference()
        assert len(buffer_addresses) == 1
        past[0].mul_(3)
        assert_same(append(buffers, past, new)[0], cat(past, new))


@settings(max_examples=60)
@given(st.data())
def test_random_histories_are_those_of_cat(data: st.DataObject) -> None:
    buffers = AppendBuffers(CountingBuilder())  # type: ignore[arg-type]
    start = rows(data.draw(st.integers(0, 5)), batch=2)
    alive: list[tuple[Pair, Pair]] = [(start, cat(start, rows(0, batch=2)))]
    for _ in range(data.draw(st.integers(1, 25))):
        past, expected = data.draw(st.sampled_from(alive))
        action = data.draw(st.sampled_from(["append", "append", "append", "crop", "reorder", "drop"]))
        if action == "append":
            new = rows(data.draw(st.sampled_from([1, 1, 2, 40])), batch=2)
            alive.append((append(buffers, past, new)[0], cat(expected, new)))
        elif action == "crop":
            keep = data.draw(st.integers(0, past[0].shape[2]))
            alive.append(tuple(tuple(tensor[:, :, :keep] for tensor in which) for which in (past, expected)))  # type: ignore[arg-type]
        elif action == "reorder":
            order = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=2, max_size=2)))
            alive.append(tuple(tuple(tensor[order] for tensor in which) for which in (past, expected)))  # type: ignore[arg-type]
        elif len(alive) > 1:
            alive.pop(data.draw(st.integers(0, len(alive) - 1)))
        for ours, theirs in alive:
            assert_same(ours, theirs)
