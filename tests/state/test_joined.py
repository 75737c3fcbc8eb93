"""Latents and rope keys side by side: they follow the cache, whatever happens to it."""

from __future__ import annotations

import pytest
import torch

from alignedkv_compile.layout import PLANES_VALID
from alignedkv_compile.state.copies import MAX_CONSECUTIVE_COPIES
from alignedkv_compile.state.joined import Joined, JoinedKeys

ROWS = 40


class Builder:
    """Counts, and marks planes valid."""

    def __init__(self) -> None:
        self.builds = 0

    def rebuild(self, planes: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: int) -> None:
        assert torch.equal(key[..., : value.shape[3]], value)
        self.builds += 1
        planes[:8].view(torch.int64).fill_(PLANES_VALID)


class Model:
    """A pair of caches that one call after the other writes a row of."""

    def __init__(self, *, planes: bool = True, trust: bool = False) -> None:
        self.builder = Builder()
        self.joined = JoinedKeys(self.builder)
        self.planes, self.trust = planes, trust
        self.cache = [torch.randn(2, 1, ROWS, width) for width in (8, 4)]
        self.position = 0

    def call(self) -> Joined:
        latent, rope = self.cache
        joined = self.joined.before_call(latent, rope, with_planes=self.planes, trust_unversioned=self.trust)
        assert torch.equal(joined.rows, torch.cat((latent, rope), -1))
        for tensor in self.cache:
            tensor[:, :, self.position] = torch.randn(2, 1, tensor.shape[3])
        joined.rows[:, :, self.position] = torch.cat((latent, rope), -1)[:, :, self.position]
        self.position = (self.position + 1) % ROWS
        self.joined.after_call(joined, latent, rope)
        return joined

    @staticmethod
    def is_valid(joined: Joined) -> bool:
        assert joined.planes is not None
        return int(joined.planes[:8].view(torch.int64)) == PLANES_VALID


def test_rows_are_copied_once() -> None:
    model = Model()
    first = model.call()
    for _ in range(5):
        joined = model.call()
        assert joined is first
        assert model.is_valid(joined)
    assert model.builder.builds == len(model.joined) == 1


@pytest.mark.parametrize("which", [0, 1])
def test_an_edit_is_copied(which: int) -> None:
    model = Model()
    model.call()
    model.cache[which][:, :, 3] = 7.0
    assert model.is_valid(model.call())
    assert model.builder.builds == 2


def test_a_cache_edited_before_every_call_gets_no_planes_until_it_is_left_alone() -> None:
    model = Model()
    valid = []
    for _ in range(MAX_CONSECUTIVE_COPIES + 3):
        model.cache[1].add_(1)
        valid.append(model.is_valid(joined := model.call()))
    assert valid == [True] * MAX_CONSECUTIVE_COPIES + [False] * 3
    assert "written by other code" in joined.note
    joined = model.call()
    assert model.is_valid(joined)
    assert joined.note == ""


@pytest.mark.parametrize("trust", [False, True])
def test_inference_tensors_are_copied_at_every_call_unless_trusted(trust: bool) -> None:
    with torch.inference_mode():
        model = Model(trust=trust)
        joined = [model.call() for _ in range(3)]
    assert model.is_valid(joined[-1]) == trust
    assert ("torch.inference_mode()" in joined[-1].note) == (not trust)
    assert model.builder.builds == trust


def test_without_planes() -> None:
    model = Model(planes=False)
    for _ in range(3):
        assert model.call().planes is None
    model.planes = True
    assert model.is_valid(model.call())
    assert model.builder.builds == 1


def test_another_size_behind_the_same_tensors_is_copied() -> None:
    model = Model()
    model.call()
    for tensor in model.cache:
        tensor.data = torch.randn(1, 1, 7, tensor.shape[3])
    latent, rope = model.cache
    joined = model.joined.before_call(latent, rope, with_planes=True, trust_unversioned=False)
    assert torch.equal(joined.rows, torch.cat((latent, rope), -1))


def test_a_failed_call_forgets_the_rows() -> None:
    model = Model()
    model.call()
    model.joined.before_call(*model.cache, with_planes=True, trust_unversioned=False)
    assert len(model.joined) == 0
    model.call()


def test_rows_die_with_their_caches() -> None:
    model = Model()
    model.call()
    model.cache.pop()
    assert len(model.joined) == 0
