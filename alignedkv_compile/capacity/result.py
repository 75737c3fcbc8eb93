"""How many tokens fit: the search, and what it found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import CapacityError
from .shapes import ModelShape
from .storages import STATIC, STORAGE_KINDS

MOST_ROWS = 1 << 32
"""More rows than this are as good as any number: nothing that grows with the tokens would still fit."""


@dataclass(frozen=True)
class Fit:
    """One way to store the cache.

    Attributes:
        storage: its name.
        what: a few words on it.
        tokens: most tokens of every sequence that fit, 0 for none, None for any number.
        held: bytes of a cache for so many; of one for a single token where none or any number fits.
        over_stock: tokens over those of a ``StaticCache``, None where either is 0 or unlimited.
    """

    storage: str
    what: str
    tokens: int | None
    held: int
    over_stock: float | None


@dataclass(frozen=True)
class Capacity:
    """What fits into a memory limit; :meth:`write` saves it as JSON.

    Attributes:
        model: its name.
        positions: tokens that it was made for, None if unknown.
        batch: sequences.
        dtype: of K and V.
        memory: the limit in bytes.
        weights: bytes of the weights that were taken off it, 0 for none.
        fits: one entry per way to store the cache.
    """

    model: str
    positions: int | None
    batch: int
    dtype: str
    memory: int
    weights: int
    fits: tuple[Fit, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def write(self, path: Path) -> None:
        """Write :meth:`to_dict` as JSON to ``path``, making its folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")


def find_capacity(model: ModelShape, memory: int, *, with_weights: bool = False) -> Capacity:
    """How many tokens of every sequence fit into ``memory`` bytes, for every way to store the cache.

    Args:
        model: what it puts into its cache.
        memory: the limit.
        with_weights: whether the model's weights must fit, too.

    Raises:
        CapacityError: the weights alone do not fit.
    """
    weights = model.weights if with_weights else 0
    room = memory - weights
    if room <= 0:
        raise CapacityError(f"the weights of {model.name} alone take {weights} bytes, and the limit is {memory}")
    found = []
    for kind in STORAGE_KINDS:
        tokens = most_rows(lambda rows, kind=kind: kind.held(model, rows), room)  # type: ignore[misc]
        found.append((kind, tokens, kind.held(model, tokens or 1)))
    stock = next(tokens for kind, tokens, _ in found if kind.name == STATIC)
    fits = tuple(
        Fit(kind.name, kind.what, tokens, held, tokens / stock if tokens and stock else None) for kind, tokens, held in found
    )
    dtype = str(model.dtype).removeprefix("torch.")
    return Capacity(model.name, model.positions, model.batch, dtype, memory, weights, fits)


def most_rows(held: Callable[[int], int], room: int) -> int | None:
    """The most rows whose ``held`` bytes, which never fall with the rows, are at most ``room``; None for any number."""
    if held(1) > room:
        return 0
    low, high = 1, 2
    while high <= MOST_ROWS and held(high) <= room:
        low, high = high, 2 * high
    if high > MOST_ROWS:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if held(middle) <= room else (low, middle)
    return low
