"""Planes beside static caches: when they are trusted, rebuilt, marked stale and freed."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

from alignedkv_compile.layout import PLANES_STALE, PLANES_VALID, arena_layout
from alignedkv_compile.state.sidecar import (
    MAX_CONSECUTIVE_REBUILDS,
    NO_VERSION_COUNTER,
    REBUILD_FAILED,
    REBUILT_TOO_OFTEN,
    STALE_CALLS,
    Sidecar,
    SidecarStore,
)


class RecordingBuilder:
    """Stands in for the compiled write op: stamps the arena, so that a test sees which tensor it was built from."""

    def __init__(self) -> None:
        self.rebuilds = 0
        self.error: Exception | None = None

    def rebuild(self, planes: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: int) -> None:
        self.rebuilds += 1
        if self.error is not None:
            raise self.error
        planes[64:].fill_(int(key.sum()) % 251)
        planes[:8].view(torch.int64).fill_(PLANES_VALID)


@pytest.fixture
def builder() -> RecordingBuilder:
    return RecordingBuilder()


@pytest.fixture
def store(builder: RecordingBuilder) -> SidecarStore:
    return SidecarStore(builder)  # type: ignore[arg-type]


def caches(rows: int = 70) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(1, 2, rows, 16), torch.zeros(1, 2, rows, 16)


def header(sidecar: Sidecar) -> int:
    return int(sidecar.planes[:8].view(torch.int64))


def call(store: SidecarStore, key: torch.Tensor, value: torch.Tensor, **choices: bool) -> Sidecar:
    """One call of a graph that writes a row of the cache."""
    sidecar = store.before_call(key, value, **choices)
    with torch.inference_mode(key.is_inference()):
        key[:, :, 0] += 1
    sidecar.record(key, value)
    return sidecar


def test_unchanged_tensors_keep_their_planes(store: SidecarStore, builder: RecordingBuilder) -> None:
    key, value = caches()
    sidecars = [call(store, key, value) for _ in range(10)]
    assert builder.rebuilds == 1
    assert all(sidecar is sidecars[0] for sidecar in sidecars)
    assert sidecars[0].planes.numel() == arena_layout(key, value).total
    assert header(sidecars[0]) == PLANES_VALID


def test_a_foreign_write_to_either_tensor_rebuilds(store: SidecarStore, builder: RecordingBuilder) -> None:
    key, value = caches()
    call(store, key, value)
    key.fill_(3)
    call(store, key, value)
    assert builder.rebuilds == 2
    value[:, :, 1:2].copy_(torch.ones(1, 2, 1, 16))
    call(store, key, value)
    assert builder.rebuilds == 3
    call(store, key, value)
    assert builder.rebuilds == 3


def test_two_caches_never_share_an_arena(store: SidecarStore) -> None:
    first, second = caches(), caches()
    arenas = [call(store, *tensors).planes for tensors in (first, second)]
    assert arenas[0].data_ptr() != arenas[1].data_ptr()
    key, value = first
    assert store.before_call(key, value.clone()).planes.data_ptr() != arenas[0].data_ptr()


def test_an_arena_is_freed_with_its_tensor(store: SidecarStore) -> None:
    for dying in (0, 1):
        tensors = list(caches())
        planes = weakref.ref(call(store, *tensors).planes)
        assert planes() is not None
        del tensors[dying]
        gc.collect()
        assert planes() is None
        assert len(store) == 0


def test_the_history_kept_by_a_caller_does_not_keep_the_arena(store: SidecarStore) -> None:
    tensors = caches()
    sidecar = call(store, *tensors)
    history, planes = sidecar.history, weakref.ref(sidecar.planes)
    del sidecar, tensors
    gc.collect()
    assert planes() is None
    assert history.rebuilds == 1


def test_a_failed_call_leaves_the_planes_stale_until_rebuilt(store: SidecarStore, builder: RecordingBuilder) -> None:
    key, value = caches()
    sidecar = call(store, key, value)
    sidecar.mark_stale()
    assert header(sidecar) == PLANES_STALE
    call(store, key, value)
    assert builder.rebuilds == 2
    assert header(sidecar) == PLANES_VALID


def test_somebody_who_writes_between_all_calls_stops_the_rebuilds(store: SidecarStore, builder: RecordingBuilder) -> None:
    key, value = caches()
    for _ in range(MAX_CONSECUTIVE_REBUILDS):
        value.add_(1)
        assert call(store, key, value).valid
    for _ in range(STALE_CALLS):
        value.add_(1)
        sidecar = call(store, key, value)
        assert header(sidecar) == PLANES_STALE
        assert sidecar.history.stale_reason == REBUILT_TOO_OFTEN
    assert builder.rebuilds == MAX_CONSECUTIVE_REBUILDS
    value.add_(1)
    assert call(store, key, value).valid  # the retry
    value.add_(1)
    assert not call(store, key, value).valid  # nothing has changed: stale again at once
    assert builder.rebuilds == MAX_CONSECUTIVE_REBUILDS + 1


def test_a_new_tensor_in_place_of_the_last_at_each_call_counts_as_rebuilding(
    store: SidecarStore, builder: RecordingBuilder
) -> None:
    """Beam search reorders the cache at every token, into new tensors."""
    history, key, value = None, *caches()
    for _ in range(MAX_CONSECUTIVE_REBUILDS + 5):
        reordered = key.flip(0), value.flip(0)
        del key, value
        key, value = reordered
        sidecar = store.before_call(key, value, history)
        sidecar.record(key, value)
        history = sidecar.history
        del reordered
    assert builder.rebuilds == MAX_CONSECUTIVE_REBUILDS
    assert history.stale_reason == REBUILT_TOO_OFTEN


def test_caches_that_take_turns_have_histories_of_their_own(store: SidecarStore, builder: RecordingBuilder) -> None:
    pairs, history = [caches() for _ in range(MAX_CONSECUTIVE_REBUILDS + 3)], None
    for pair in pairs:
        sidecar = store.before_call(*pair, history)
        sidecar.record(*pair)
        history = sidecar.history
        assert sidecar.valid
    assert builder.rebuilds == len(pairs)


def test_after_the_retry_a_quiet_cache_is_trusted_again(store: SidecarStore, builder: RecordingBuilder) -> None:
    key, value = caches()
    for _ in range(MAX_CONSECUTIVE_REBUILDS + STALE_CALLS):
        value.add_(1)
        call(store, key, value)
    for _ in range(3):
        assert call(store, key, value).valid
    assert builder.rebuilds == MAX_CONSECUTIVE_REBUILDS + 1
    value.add_(1)
    assert call(store, key, value).valid


def test_a_new_view_of_the_same_memory_at_each_call_counts_as_rebuilding(
    store: SidecarStore, builder: RecordingBuilder
) -> None:
    memory, history = torch.zeros(2, 1, 2, 70, 16), None
    for _ in range(20):
        key, value = memory[0], memory[1]
        sidecar = store.before_call(key, value, history)
        sidecar.record(key, value)
        history = sidecar.history
    assert builder.rebuilds == MAX_CONSECUTIVE_REBUILDS
    assert not sidecar.valid
    assert sidecar.history.stale_reason == REBUILT_TOO_OFTEN


def test_many_new_caches_in_a_row_are_no_rebuilds(store: SidecarStore, builder: RecordingBuilder) -> None:
    alive, history = [], None
    for _ in range(12):
        key, value = caches()
        sidecar = store.before_call(key, value, history)
        history = sidecar.history
        alive.append((key, value))
        assert sidecar.valid
    assert builder.rebuilds == 12


def test_inference_tensors_are_stale_unless_trusted(store: SidecarStore, builder: RecordingBuilder) -> None:
    with torch.inference_mode():
        key, value = caches()
        for _ in range(3):
            sidecar = call(store, key, value)
            assert header(sidecar) == PLANES_STALE
            assert sidecar.history.stale_reason == NO_VERSION_COUNTER
            assert not sidecar.planes.is_inference()
        for _ in range(3):
            assert header(call(store, key, value, trust_unversioned=True)) == PLANES_VALID
        assert builder.rebuilds == 1
        # a graph that trusts nobody meets planes that one of another model, which does, has written
        assert header(call(store, key, value)) == PLANES_STALE


def test_normal_tensors_count_versions_inside_inference_mode(store: SidecarStore, builder: RecordingBuilder) -> None:
    key, value = caches()
    with torch.inference_mode():
        for _ in range(3):
            assert call(store, key, value).valid
        key.zero_()
        call(store, key, value)
    assert builder.rebuilds == 2


def test_a_failing_rebuild_means_stale_planes_and_a_reason(
    store: SidecarStore, builder: RecordingBuilder, caplog: pytest.LogCaptureFixture
) -> None:
    key, value = caches()
    builder.error = RuntimeError("no compiler")
    sidecar = call(store, key, value)
    assert header(sidecar) == PLANES_STALE
    assert sidecar.history.stale_reason.startswith(REBUILD_FAILED)
    assert "no compiler" in caplog.text
    builder.error = None
    for _ in range(STALE_CALLS):
        call(store, key, value)
    assert header(sidecar) == PLANES_VALID


def test_data_exchanged_for_another_size_gets_another_arena(store: SidecarStore) -> None:
    key, value = caches()
    call(store, key, value)
    key.data, value.data = torch.ones(1, 2, 200, 16), torch.ones(1, 2, 200, 16)
    sidecar = call(store, key, value)
    assert sidecar.planes.numel() == arena_layout(key, value).total
    assert sidecar.valid


def test_several_threads_with_caches_of_their_own(store: SidecarStore, builder: RecordingBuilder) -> None:
    failures: list[str] = []

    def work() -> None:
        for _ in range(20):
            key, value = caches()
            first = call(store, key, value)
            if any(call(store, key, value) is not first or not first.valid for _ in range(5)):
                failures.append("planes were lost")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert builder.rebuilds == 8 * 20
    gc.collect()
    assert len(store) == 0
