"""Layers of a cache that hold planes: what ``transformers`` expects of its ``DynamicLayer`` and its ``StaticLayer``.

``update`` writes new rows by :data:`~alignedkv_compile.ops.store_rows` and returns what
:data:`~alignedkv_compile.ops.load_rows` makes of the arena, with the new rows as they are at hand. That is right in eager code
and under any compiler; the passes of this package read the arena directly instead (``passes/caches/packed.py``).
"""

from __future__ import annotations

import abc
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from .. import torch_private
from ..arena_copies import resized, selected
from ..arena_memory import zeroed_arena
from ..errors import CacheRowsError
from ..layout import MAX_HEAD_DIM, SCORE_GROUP, ArenaLayout
from ..storage import DTYPES, STORAGES
from . import rows
from .usage import USAGE

GROWTH = 64
"""A growing layer makes room for one more of so many rows at a time, and for a group at least: little to spare, and a row is
copied some sixty times in its life, which is less than what one token reads."""


class PackedLayer(CacheLayerMixin):
    """One layer's K and V as an arena.

    Attributes:
        storage: name of what is held of a row, one of :data:`alignedkv_compile.storage.PACKED`.
        planes: the arena, uint8 ``[N]``; None before the first rows.
        capacity: rows that it has room for.
    """

    is_sliding = False

    def __init__(self, storage: str) -> None:
        self.storage = storage
        self.is_initialized = False
        self.planes: torch.Tensor | None = None
        self.capacity = 0
        self.batch_size = self.num_heads = self.k_head_dim = self.v_head_dim = 0
        self.dtype = torch.float32
        self.device = torch.device("cpu")
        USAGE.watch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        USAGE.watch(self)

    @property
    @abc.abstractmethod
    def rows(self) -> int:
        """How many rows :meth:`update` returns, and :attr:`keys` has."""

    @property
    def layout(self) -> ArenaLayout:
        """Where the arena's sections are."""
        heads = self.batch_size * self.num_heads
        return ArenaLayout(heads, self.capacity, self.k_head_dim, self.v_head_dim, STORAGES[self.storage], self.dtype.itemsize)

    @property
    def keys(self) -> torch.Tensor | None:
        """K as it is held, decoded: ``[B, H, rows, Dk]``, a new tensor each time. None before the first rows."""
        return self._decoded()[0] if self.is_initialized else None

    @property
    def values(self) -> torch.Tensor | None:
        """V, likewise."""
        return self._decoded()[1] if self.is_initialized else None

    def _decoded(self) -> tuple[torch.Tensor, torch.Tensor]:
        none = torch.arange(0, device=self.device)
        key = torch.empty(self.batch_size, self.num_heads, 0, self.k_head_dim, dtype=self.dtype, device=self.device)
        value = key.new_empty(self.batch_size, self.num_heads, 0, self.v_head_dim)
        assert self.planes is not None
        return rows.load(self.planes, key, value, none, self.rows, self.capacity, self.storage)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.planes is None else self.planes.nbytes

    def _take_shape(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Remember what rows are like.

        Raises:
            CacheRowsError: no arena can hold them.
        """
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        if self.dtype not in DTYPES.values() or value_states.dtype != self.dtype:
            raise CacheRowsError(f"rows of {self.dtype} and {value_states.dtype}; both must be bfloat16, float16 or float32")
        for size in (self.k_head_dim, self.v_head_dim):
            if not 8 <= size <= MAX_HEAD_DIM:
                raise CacheRowsError(f"rows of {size} numbers; from 8 to {MAX_HEAD_DIM} are possible")

    def _check_rows(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Refuse rows unlike the first ones.

        Raises:
            CacheRowsError: naming both shapes.
        """
        held = (self.batch_size, self.num_heads, self.k_head_dim, self.v_head_dim, self.dtype)
        given = (*key_states.shape[:2], key_states.shape[3], value_states.shape[3], key_states.dtype)
        if held != given:
            raise CacheRowsError(
                f"rows of batch, heads, K, V and dtype {given} in a layer that holds {held}; use a new cache, or reset this one"
            )

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._take_shape(key_states, value_states)
        self.planes = zeroed_arena(self.layout.total, self.device)
        self.is_initialized = True

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.is_initialized:
            self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch entry."""
        if self.is_initialized:
            self._select(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some batch entries."""
        if self.is_initialized:
            self._select(torch.arange(self.batch_size)[indices.cpu()])

    def _select(self, entries: torch.Tensor) -> None:
        assert self.planes is not None
        chosen = selected(self.planes, self.layout, entries, self.num_heads)
        self.batch_size = int(entries.shape[0])
        if chosen.shape == self.planes.shape:
            self.planes.copy_(chosen)  # the address may be a CUDA graph's
        else:
            self.planes = chosen

    def offload(self) -> None:
        if self.planes is not None:
            self.planes = self.planes.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        if self.planes is not None and self.planes.device != self.device:
            self.planes = self.planes.to(self.device, non_blocking=True)


class GrowingPackedLayer(PackedLayer):
    """A layer that makes room as rows come, a group of rows or one of :data:`GROWTH` at a time.

    Attributes:
        length: rows held.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, storage: str) -> None:
        super().__init__(storage)
        self.length = 0

    @property
    def rows(self) -> int:
        return self.length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows, and return all of them.

        Raises:
            CacheRowsError: they are unlike the first ones, or nothing can hold them.
        """
        past, new = self.length, key_states.shape[-2]
        if not self.is_initialized:
            self.capacity = _room_for(new)
            self.lazy_initialization(key_states, value_states)
        else:
            self._check_rows(key_states, value_states)
        assert self.planes is not None
        if past + new > self.capacity:
            self._resize(_room_for(past + new))
        positions = torch.arange(past, past + new, device=key_states.device)
        rows.store(self.planes, key_states, value_states, positions, self.capacity, self.storage)
        self.length = past + new
        if past == 0:
            return key_states, value_states
        return rows.load(self.planes, key_states, value_states, positions, past + new, self.capacity, self.storage)

    def reserve(self) -> None:
        """Make room for one more row, outside of compiled code, where no graph has to be made for it."""
        if self.is_initialized and self.length == self.capacity:
            self._resize(_room_for(self.length + 1))

    def _resize(self, capacity: int) -> None:
        assert self.planes is not None
        size = (self.batch_size * self.num_heads, self.capacity, self.k_head_dim, self.v_head_dim)
        self.planes = torch.ops.alignedkv.resized_planes.default(
            self.planes, *size, self.storage, self.dtype.itemsize, capacity
        )
        self.capacity = capacity

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` rows.

        Raises:
            ValueError: it is positive, as in ``DynamicLayer``.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of rows to remove as a negative integer, not {tokens_to_remove}")
        self.length = max(self.length + tokens_to_remove, 0)
        if self.planes is not None:  # rows that come from here on are in the window again, however many were removed
            self.planes[8:16].view(torch.int64).clamp_(max=self.length)

    def reset(self) -> None:
        self.planes, self.is_initialized, self.length, self.capacity = None, False, 0, 0

    def __getstate__(self) -> dict[str, Any]:
        """Live rows only: what a copy or a pickle takes along."""
        state = dict(vars(self))
        if self.planes is not None:
            state["planes"], state["capacity"] = resized(self.planes, self.layout, self.length), self.length
        return state


class StaticPackedLayer(PackedLayer):
    """A layer with room for a fixed number of rows, at one address.

    Attributes:
        max_cache_len: that number.
        cumulative_length: rows written, an int64 tensor, so that graphs do not depend on it.
    """

    is_compileable = True
    is_croppable = False

    def __init__(self, storage: str, max_cache_len: int) -> None:
        super().__init__(storage)
        self.max_cache_len = self.capacity = max_cache_len
        self.cumulative_length = torch.tensor(0, dtype=torch.int64)

    @property
    def rows(self) -> int:
        return self.max_cache_len

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not torch.compiler.is_compiling():  # else CUDA graphs do without, as with a StaticCache
            assert self.planes is not None
            torch_private.mark_static_address(self.planes)
            torch_private.mark_static_address(self.cumulative_length)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write rows behind those that are there, and return all that there is room for.

        Raises:
            CacheRowsError: they are unlike the first ones, or nothing can hold them.
            IndexError: there is no room left.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check_rows(key_states, value_states)
        assert self.planes is not None
        new = key_states.shape[-2]
        positions = torch.arange(new, device=key_states.device) + self.cumulative_length
        call = (self.planes, key_states, value_states, positions)
        rows.store(*call, self.capacity, self.storage)
        self.cumulative_length.add_(new)
        return rows.load(*call, self.capacity, self.capacity, self.storage)

    def get_seq_length(self) -> int | torch.Tensor:
        return self.cumulative_length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def reset(self) -> None:
        if self.planes is not None:
            self.planes.zero_()
        self.cumulative_length.zero_()


def _room_for(rows: int) -> int:
    """Rows to have room for when ``rows`` are needed: whole groups."""
    return -(-(rows + rows // GROWTH) // SCORE_GROUP) * SCORE_GROUP
