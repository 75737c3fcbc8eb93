"""Which tensor is this, and has anybody written it since? What the backend's state is keyed by, and checked against.

:class:`WeakPairMap` maps tensor objects to values and forgets an entry when a tensor that the entry stands on dies.
``torch.utils.weak.WeakTensorKeyDictionary`` does this for one key at several microseconds per look-up. A decode step looks up
every layer, so the map here is a plain dict keyed by ``id``, which a weak reference's callback empties: an ``id`` is
only used again after its object has died, and by then the callback has run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch

Value = TypeVar("Value")


def observe(key: torch.Tensor, value: torch.Tensor, versioned: bool = True) -> object:
    """What tells whether a pair of tensors was written or exchanged: compare two observations with ``==``.

    Args:
        key, value: any tensors.
        versioned: False leaves the version counters out (inference-mode tensors have none, and reading one raises).
    """
    versions = (key._version, value._version) if versioned else None
    return versions, key.data_ptr(), value.data_ptr(), key.shape, value.shape, key.stride(), value.stride()


class _Reference(weakref.ReferenceType[torch.Tensor]):
    """A weak reference that knows under which key its entry is filed."""

    __slots__ = ("key",)

    key: int

    def __new__(cls, tensor: torch.Tensor, callback: Callable[[_Reference], None], key: int) -> _Reference:
        self = super().__new__(cls, tensor, callback)
        self.key = key
        return self

    def __init__(self, tensor: torch.Tensor, callback: Callable[[_Reference], None], key: int) -> None:
        super().__init__(tensor, callback)  # type: ignore[call-arg]


class WeakPairMap(Generic[Value]):
    """``(first, second) -> value``, by object identity, at most one value per ``first``.

    Every method is one or two dict operations, each atomic under the interpreter lock, so that no lock is needed and a
    callback that the garbage collector runs in the middle of one of them is harmless.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[int, Value, _Reference, _Reference]] = {}
        self._callback = self._forget

    def get(self, first: torch.Tensor, second: torch.Tensor) -> Value | None:
        """The value filed under this very pair of objects, or None."""
        entry = self._entries.get(id(first))
        return entry[1] if entry is not None and entry[0] == id(second) else None

    def pop(self, first: torch.Tensor, second: torch.Tensor) -> Value | None:
        """Take the pair's value out; of several threads that try, one gets it. None when it is not there."""
        entry = self._entries.pop(id(first), None)
        return entry[1] if entry is not None and entry[0] == id(second) else None

    def set(self, first: torch.Tensor, second: torch.Tensor, value: Value) -> None:
        """File ``value`` until either tensor dies; replaces what was filed under ``first``."""
        key = id(first)
        self._entries[key] = (
            id(second),
            value,
            _Reference(first, self._callback, key),
            _Reference(second, self._callback, key),
        )

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Value]:
        return iter([entry[1] for entry in list(self._entries.values())])

    def items(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, Value]]:
        """``(first, second, value)`` of every entry whose tensors are alive."""
        for _, value, first_reference, second_reference in list(self._entries.values()):
            first, second = first_reference(), second_reference()
            if first is not None and second is not None:
                yield first, second, value

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def _forget(self, reference: _Reference) -> None:
        self._entries.pop(reference.key, None)
