"""Ways to store a KV cache, as the cache objects that a ``transformers`` model takes.

Stock 16 bits, the modes of :class:`alignedkv_compile.Cache`, ``transformers``' own ``QuantizedCache`` with the settings that
its documentation recommends for each backend (groups of 64 numbers of one token; up to 127 rows that came after the prefill
stay in 16 bits), and K and V rounded to 8-bit floats.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...storage import PACKED
from ..errors import EvaluationError

STOCK = "stock"


@dataclass(frozen=True)
class CacheKind:
    """A way to store the cache.

    Attributes:
        name: what tables call it.
        make: gives an empty cache for a model's config.
        modules: what must be importable.
        install: how to get them.
        slow: only run when asked for by name or with ``--full``: filling such a cache takes minutes at long contexts.
    """

    name: str
    make: Callable[[Any], Any]
    modules: tuple[str, ...] = ()
    install: str = ""
    slow: bool = False

    @property
    def missing(self) -> str:
        """Why this kind cannot be used here, "" when it can."""
        absent = [name for name in self.modules if importlib.util.find_spec(name.partition(".")[0]) is None]
        return f"{', '.join(absent)} is not installed: {self.install}" if absent else ""


def _stock(config: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=config)


def _quantized(backend: str, bits: int | None = None, axis: int | None = None) -> Callable[[Any], Any]:
    def make(config: Any) -> Any:
        from transformers import QuantizedCache

        return QuantizedCache(backend, config, nbits=bits, axis_key=axis, axis_value=axis)

    return make


def _packed(mode: str) -> Callable[[Any], Any]:
    def make(config: Any) -> Any:
        from ...cache import Cache

        return Cache(config, mode)

    return make


def _rounded(dtype: torch.dtype) -> Callable[[Any], Any]:
    def make(config: Any) -> Any:
        from .rounded import rounded_cache

        return rounded_cache(config, dtype)

    return make


_HQQ = (("hqq", "termcolor"), "pip install 'alignedkv-compile[eval]'")
_QUANTO = (("optimum",), "pip install 'alignedkv-compile[eval]'")

KINDS: tuple[CacheKind, ...] = (
    CacheKind(STOCK, _stock),
    *(CacheKind(mode, _packed(mode)) for mode in PACKED),
    CacheKind("HF hqq 8-bit", _quantized("hqq", 8, 1), *_HQQ),
    CacheKind("HF hqq 4-bit", _quantized("hqq", 4, 1), *_HQQ, slow=True),
    CacheKind("HF quanto 4-bit", _quantized("quanto", 4, 0), *_QUANTO),
    CacheKind("HF fp8", _quantized("fp8")),
    CacheKind("fp8 e4m3 cast", _rounded(torch.float8_e4m3fn)),
    CacheKind("fp8 e5m2 cast", _rounded(torch.float8_e5m2)),
)
"""Every kind, stock first, which the others are compared with."""


def choose(names: Sequence[str] | None, full: bool = False) -> tuple[CacheKind, ...]:
    """Those of :data:`KINDS` with these names, and stock; for None all that are installed, slow ones only if ``full``.

    Raises:
        EvaluationError: an unknown name, or what it needs is not installed.
    """
    if names is None:
        return tuple(kind for kind in KINDS if not kind.missing and (full or not kind.slow))
    known = {kind.name: kind for kind in KINDS}
    for name in names:
        if name not in known:
            raise EvaluationError(f"there is no kind of cache {name!r}; there are {', '.join(known)}")
        if known[name].missing:
            raise EvaluationError(f"{name}: {known[name].missing}")
    return tuple(kind for kind in KINDS if kind.name in names or kind.name == STOCK)
