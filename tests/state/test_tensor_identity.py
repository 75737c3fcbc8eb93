"""The weak map and the observations that all run-time state rests on."""

from __future__ import annotations

import copy
import gc

import torch
from hypothesis import given
from hypothesis import strategies as st

from alignedkv_compile.state.tensor_identity import WeakPairMap, observe


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8)


def test_values_are_found_by_identity_of_both() -> None:
    entries: WeakPairMap[str] = WeakPairMap()
    key, value = pair()
    entries.set(key, value, "planes")
    assert entries.get(key, value) == "planes"
    assert entries.get(key, value.clone()) is None
    assert entries.get(key.view_as(key), value) is None
    assert entries.get(copy.copy(key), value) is None


def test_an_entry_dies_with_either_tensor() -> None:
    for dying in (0, 1):
        entries: WeakPairMap[object] = WeakPairMap()
        tensors = list(pair())
        entries.set(*tensors, object())
        del tensors[dying]
        gc.collect()
        assert len(entries) == 0


def test_a_view_keeps_its_base_alive_and_with_it_the_entry() -> None:
    entries: WeakPairMap[str] = WeakPairMap()
    key, value = pair()
    entries.set(key, value, "x")
    view = key[:, :1]
    del key
    gc.collect()
    base = view._base
    assert base is not None
    assert entries.get(base, value) == "x"
    del view, base
    gc.collect()
    assert len(entries) == 0


def test_replacing_a_value_keeps_the_new_one_when_the_old_partner_dies() -> None:
    entries: WeakPairMap[str] = WeakPairMap()
    key, value = pair()
    other = value.clone()
    entries.set(key, value, "old")
    entries.set(key, other, "new")
    del value
    gc.collect()
    assert entries.get(key, other) == "new"


def test_pop_hands_the_value_out_once() -> None:
    entries: WeakPairMap[str] = WeakPairMap()
    key, value = pair()
    entries.set(key, value, "x")
    assert [entries.pop(key, value), entries.pop(key, value)] == ["x", None]


@given(st.lists(st.sampled_from(["set", "drop", "get"]), max_size=60))
def test_ids_that_are_used_again_never_find_an_old_entry(actions: list[str]) -> None:
    entries: WeakPairMap[int] = WeakPairMap()
    alive: list[tuple[torch.Tensor, torch.Tensor, int]] = []
    for number, action in enumerate(actions):
        if action == "set":
            key, value = pair()
            assert entries.get(key, value) is None
            entries.set(key, value, number)
            alive.append((key, value, number))
            del key, value
        elif action == "drop" and alive:
            alive.pop(number % len(alive))
        assert len(entries) == len(alive)
        assert all(entries.get(key, value) == expected for key, value, expected in alive)


def test_observation_changes_with_every_kind_of_write() -> None:
    def in_place(tensor: torch.Tensor) -> None:
        tensor.add_(1)

    def through_a_slice(tensor: torch.Tensor) -> None:
        tensor[:, :, 1] = 3

    def through_a_view(tensor: torch.Tensor) -> None:
        tensor.view(-1).zero_()

    def under_inference_mode(tensor: torch.Tensor) -> None:
        with torch.inference_mode():
            tensor.mul_(2)

    def other_data(tensor: torch.Tensor) -> None:
        tensor.data = torch.zeros_like(tensor)

    def other_shape(tensor: torch.Tensor) -> None:
        tensor.data = tensor.data[:, :, :2]

    for write in (in_place, through_a_slice, through_a_view, under_inference_mode, other_data, other_shape):
        for victim in (0, 1):
            tensors = pair()
            before = observe(*tensors)
            assert observe(*tensors) == before
            write(tensors[victim])
            assert observe(*tensors) != before, write.__name__


def test_observation_of_inference_tensors_leaves_versions_out() -> None:
    with torch.inference_mode():
        tensors = pair()
    assert observe(*tensors, versioned=False) == observe(*tensors, versioned=False)
