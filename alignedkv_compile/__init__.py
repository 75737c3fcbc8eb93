"""Precision-aligned KV caches for ``torch.compile``: numbers are read only as precisely as their place in a sum deserves.

    model.forward = torch.compile(model.forward, backend="alignedkv")

The backend is found by its name, without importing this package; what follows is for looking at what it did.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from . import metrics as metrics
from . import reference as reference  # gives the operators their eager meaning
from . import reference_write as reference_write
from .backend import alignedkv
from .errors import (
    AlignedKVError,
    CacheRowsError,
    CacheTypeError,
    DeclinedError,
    OptionValueError,
    StatisticsDisabledError,
    UnknownInductorOptionError,
    UnknownModeError,
    UnknownOptionError,
)
from .options import Options
from .report import GraphReport, Report, report, reset_report
from .shadow import ShadowCheck, on_shadow
from .state.live_rows import compact
from .statistics import LayerStatistics, Statistics, reset_stats, stats

try:
    __version__ = version("alignedkv-compile")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "unknown"

if TYPE_CHECKING:
    from .cache import Cache


def __getattr__(name: str) -> Any:
    """``Cache`` when it is first asked for: it imports transformers, which nothing else here needs."""
    if name == "Cache":
        from .cache import Cache

        return Cache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "alignedkv",
    "Options",
    "report",
    "reset_report",
    "Report",
    "GraphReport",
    "stats",
    "reset_stats",
    "Statistics",
    "LayerStatistics",
    "on_shadow",
    "ShadowCheck",
    "compact",
    "Cache",
    "metrics",
    "AlignedKVError",
    "CacheRowsError",
    "CacheTypeError",
    "DeclinedError",
    "OptionValueError",
    "StatisticsDisabledError",
    "UnknownInductorOptionError",
    "UnknownModeError",
    "UnknownOptionError",
    "__version__",
]
