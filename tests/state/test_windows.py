"""Windows beside shifted caches: rows and planes follow the cache, whatever happens to it."""

from __future__ import annotations

import pytest
import torch

from alignedkv_compile.layout import PLANES_VALID
from alignedkv_compile.state.copies import MAX_CONSECUTIVE_COPIES
from alignedkv_compile.state.windows import Window, Windows, window_capacity

WINDOW = 200


class Builder:
    """Counts, and marks planes valid."""

    def __init__(self) -> None:
        self.builds = 0

    def rebuild(self, planes: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: int) -> None:
        self.builds += 1
        planes[:8].view(torch.int64).fill_(PLANES_VALID)


class Model:
    """A pair of caches that one call after the other shifts through :class:`Windows`."""

    def __init__(self, *, planes: bool = True, trust: bool = False) -> None:
        self.builder = Builder()
        self.windows = Windows(self.builder)
        self.planes, self.trust = planes, trust
        self.cache = [torch.randn(1, 2, WINDOW, 4) for _ in range(2)]

    def call(self, rows: int = 1) -> Window:
        key, value = self.cache
        window = self.windows.before_call(key, value, rows, with_planes=self.planes, trust_unversioned=self.trust)
        end = window.end
        assert window.position.tolist() == [end]
        assert end + rows <= window.key.shape[2]
        for cache, buffer in zip(self.cache, (window.key, window.value), strict=True):
            assert torch.equal(buffer[:, :, end - WINDOW : end], cache)
            new = torch.randn(1, 2, rows, 4)
            buffer[:, :, end : end + rows] = new
            cache.copy_(torch.cat([cache[:, :, rows:], new], 2))
        self.windows.after_call(window, key, value, rows)
        return window

    @staticmethod
    def is_valid(window: Window) -> bool:
        assert window.planes is not None
        return int(window.planes[:8].view(torch.int64)) == PLANES_VALID


def test_rows_move_only_when_the_room_is_used_up() -> None:
    model = Model()
    room = window_capacity(WINDOW) - WINDOW
    for _ in range(3 * room):
        assert model.is_valid(model.call())
    assert model.builder.builds == 3
    assert len(model.windows) == 1


@pytest.mark.parametrize("rows", [2, 7, 16])
def test_several_rows_at_once(rows: int) -> None:
    model = Model()
    for _ in range(60):
        model.call(rows)


def test_an_edit_is_copied() -> None:
    model = Model()
    model.call()
    model.cache[0][:, :, 3] = 7.0
    assert model.is_valid(model.call())
    model.cache[1].zero_()
    assert model.is_valid(model.call())
    assert model.builder.builds == 3


def test_a_cache_edited_before_every_call_gets_no_planes_any_more() -> None:
    model = Model()
    valid = []
    for _ in range(MAX_CONSECUTIVE_COPIES + 3):
        model.cache[0].add_(1)
        valid.append(model.is_valid(window := model.call()))
    assert valid == [True] * MAX_CONSECUTIVE_COPIES + [False] * 3
    assert "written by other code" in window.note
    for _ in range(2 * window_capacity(WINDOW)):
        window = model.call()
    assert model.is_valid(window), "planes come back when the rows move"
    assert window.note == ""


@pytest.mark.parametrize("trust", [False, True])
def test_inference_tensors_are_copied_at_every_call_unless_trusted(trust: bool) -> None:
    with torch.inference_mode():
        model = Model(trust=trust)
        windows = [model.call() for _ in range(3)]
    assert [model.is_valid(window) for window in windows] == [trust] * 3
    assert ("torch.inference_mode()" in windows[-1].note) == (not trust)
    assert (windows[-1].end == WINDOW + 3) == trust


def test_without_planes() -> None:
    model = Model(planes=False)
    for _ in range(window_capacity(WINDOW)):
        assert model.call().planes is None
    model.planes = True
    assert model.is_valid(model.call())
    assert model.builder.builds == 1


def test_a_failed_call_forgets_the_window() -> None:
    model = Model()
    model.call()
    model.windows.before_call(*model.cache, 1, with_planes=True, trust_unversioned=False)
    assert len(model.windows) == 0
    model.call()


def test_windows_die_with_their_caches() -> None:
    model = Model()
    model.call()
    model.cache.pop()
    assert len(model.windows) == 0
