"""What a plane arena holds: planes beside a cache that stays authoritative, or planes that are the cache.

===========  ==============================================================================  ==================================
name         holds of every number                                                           of a 16-bit cache's bytes
===========  ==============================================================================  ==================================
beside       both 4-bit planes; what they leave out is read from the cache tensor            (on top of it) 0.52
lossless     both planes and a residual: every number comes back bit for bit                 1.02
8bit         both planes                                                                     0.52
4bit+        the first plane; the second of the first and of the last :data:`WINDOW` rows    0.27, and 16 KiB per layer and head
===========  ==============================================================================  ==================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}
"""What a cache's numbers may be, by name."""

WINDOW = 128
"""Rows at either end of a ``4bit+`` cache that keep eight bits: attention sinks stand at its start, what is being written at
its end. A power of two, for the ring of the latter."""


@dataclass(frozen=True)
class Storage:
    """A kind of arena.

    Attributes:
        name: as users write it.
        packed: the planes are the cache; there is no other copy.
        residual: what both planes leave out is held, too (:mod:`.residual`).
        windowed: the second plane is held for the first and the last rows only.
    """

    name: str
    packed: bool = True
    residual: bool = False
    windowed: bool = False

    def has_triton(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether kernels for GPUs write and read such an arena, if the cache's numbers are of ``dtype``.

        The last bits of a float16 number's interval hang on a rounded product, which can be asked for in PTX only; CPUs, where
        kernels are interpreted, round every product.
        """
        rounds = device.type in ("cuda", "cpu") and torch.version.hip is None
        return not self.residual or dtype == torch.bfloat16 or (dtype == torch.float16 and rounds)


BESIDE = Storage("beside", packed=False)
LOSSLESS = Storage("lossless", residual=True)
EIGHT_BIT = Storage("8bit")
FOUR_BIT_PLUS = Storage("4bit+", windowed=True)

STORAGES = {storage.name: storage for storage in (BESIDE, LOSSLESS, EIGHT_BIT, FOUR_BIT_PLUS)}
PACKED = tuple(storage.name for storage in STORAGES.values() if storage.packed)
"""What a cache may be made of."""


def mid_slot(row: int) -> int:
    """Where the second plane of a ``4bit+`` cache keeps a row: the first rows in place, the others in a ring."""
    return row if row < WINDOW else WINDOW + row % WINDOW
