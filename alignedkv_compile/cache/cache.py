"""``alignedkv_compile.Cache``: what ``generate`` takes as ``past_key_values``."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache as TransformersCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from ..errors import OptionValueError
from ..storage import LOSSLESS, PACKED
from .layers import GrowingPackedLayer, PackedLayer, StaticPackedLayer


class Cache(TransformersCache):
    """A cache whose storage are the planes that decode attention reads, with no 16-bit copy.

        cache = alignedkv_compile.Cache(model.config, "8bit")
        model.generate(**inputs, past_key_values=cache)

    It works with every model that takes a ``DynamicCache`` or a ``StaticCache``, in eager code and under any compiler. With
    ``torch.compile(..., backend="alignedkv")`` on a CPU attention reads the planes directly; elsewhere rows are decoded first,
    which is right but takes the memory of one layer's rows for a moment, and its time.

    Layers of full attention hold planes. All others (sliding windows, linear attention, ...) are transformers' own.

    Args:
        config: of the model.
        mode: what is kept of each number. ``"lossless"``: all of it, bit for bit, in 1.02 times the bytes of a 16-bit cache.
            ``"8bit"``: 8 bits and a scale per row, about 0.52. ``"4bit+"``: 4 bits, and 8 for the first and the last 128
            rows, about 0.27 and 16 KiB per layer and KV head (with a head dimension of 64). A row that holds Inf or NaN
            comes back as NaN from the latter two.
        max_cache_len: with a number, room for so many rows is made at once and stays in place, as in a ``StaticCache``; None
            grows, as a ``DynamicCache`` does.

    Raises:
        OptionValueError: an unknown mode, or a ``max_cache_len`` that is no positive integer.
    """

    def __init__(self, config: Any, mode: str = LOSSLESS.name, max_cache_len: int | None = None) -> None:
        if mode not in PACKED:
            raise OptionValueError("mode", mode, " or ".join(map(repr, PACKED)))
        if max_cache_len is not None and (
            isinstance(max_cache_len, bool) or not isinstance(max_cache_len, int) or max_cache_len < 1
        ):
            raise OptionValueError("max_cache_len", max_cache_len, "a positive integer, or None to grow")
        self.mode = mode
        if max_cache_len is None:
            layers = DynamicCache(config=config).layers
            packed = [GrowingPackedLayer(mode) if type(layer) is DynamicLayer else layer for layer in layers]
        else:
            layers = StaticCache(config=config, max_cache_len=max_cache_len).layers
            packed = [StaticPackedLayer(mode, max_cache_len) if type(layer) is StaticLayer else layer for layer in layers]
        super().__init__(layers=packed)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Rows held by a layer. Called outside of compiled code, as ``generate`` does before each token, it also makes room for
        the next row, so that no graph has to be compiled for that."""
        if not torch.compiler.is_compiling():
            for layer in self.layers:
                if isinstance(layer, GrowingPackedLayer):
                    layer.reserve()
        return super().get_seq_length(layer_idx)

    @property
    def nbytes(self) -> int:
        """Bytes that the layers hold, those that are transformers' own included."""
        return sum(_held(layer) for layer in self.layers)


def _held(layer: Any) -> int:
    if isinstance(layer, PackedLayer):
        return layer.nbytes
    return sum(value.untyped_storage().nbytes() for value in vars(layer).values() if isinstance(value, torch.Tensor))
