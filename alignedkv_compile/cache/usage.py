"""What packed caches hold, for whoever watches memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..state.usage import CacheUsage, add_source

if TYPE_CHECKING:
    from .layers import PackedLayer


class PackedUsage:
    """Every layer that there is; one that is dropped is forgotten."""

    def __init__(self) -> None:
        self._layers: weakref.WeakSet[PackedLayer] = weakref.WeakSet()

    def watch(self, layer: PackedLayer) -> None:
        self._layers.add(layer)

    def usage(self) -> Iterator[CacheUsage]:
        """See :class:`alignedkv_compile.state.usage.UsageSource`."""
        for layer in list(self._layers):
            planes = layer.planes
            if planes is not None:
                rows = int(layer.get_seq_length())
                yield CacheUsage(layer.storage, planes.data_ptr(), planes.nbytes, 0, 0, rows, layer.capacity)


USAGE = PackedUsage()
add_source(USAGE)
