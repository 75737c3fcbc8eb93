"""The process's side stores, each found by its class, so that a new kind of cache brings its own."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

import torch

from .usage import CacheUsage


class Builder(Protocol):
    """Writes planes of rows that are there already."""

    def rebuild(self, planes: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: int) -> None:
        """Make ``planes`` what writing rows ``[0, rows)`` of the cache, and no others, would have made of an empty arena.

        Args:
            planes: uint8 arena for the capacity of ``key``; marked stale first and valid at the end, so that an exception
                leaves it stale.
            key: ``[B, H, C, Dk]``.
            value: ``[B, H, C, Dv]``, same dtype.
            rows: ``<= C``.
        """


def present(*tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Those that are there: planes are optional."""
    return tuple(tensor for tensor in tensors if tensor is not None)


class Store(Protocol):
    """State of one kind of cache."""

    def __init__(self, builder: Builder) -> None: ...

    def beside(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What is kept for a pair of cache tensors, with the buffers that they view; nothing for a pair that is not known."""

    def usage(self) -> Iterable[CacheUsage]:
        """See :class:`.usage.UsageSource`."""


AnyStore = TypeVar("AnyStore", bound=Store)


class Stores:
    """One store of each class: the graphs of prefill and decode, and of other models over the same cache, find the same state.

    Args:
        builder: what the stores build planes with.
    """

    def __init__(self, builder: Builder) -> None:
        self._builder = builder
        self._stores: dict[type, Store] = {}
        self._lock = threading.Lock()

    def of(self, kind: type[AnyStore]) -> AnyStore:
        """The store of a class, made when it is first asked for."""
        with self._lock:
            store = self._stores.get(kind)
            if store is None:
                store = self._stores[kind] = kind(self._builder)
        assert isinstance(store, kind)
        return store

    def beside(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors that any store keeps for a pair of cache tensors."""
        with self._lock:
            stores = list(self._stores.values())
        return tuple(tensor for store in stores for tensor in store.beside(key, value))

    def usage(self) -> Iterator[CacheUsage]:
        """What all stores hold."""
        for store in list(self._stores.values()):
            yield from store.usage()
