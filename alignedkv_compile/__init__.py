"""Precision-aligned KV caches for ``torch.compile``: numbers are read only as precisely as their place in a sum deserves.

    model.forward = torch.compile(model.forward, backend="alignedkv")

The backend is found by its name, without importing this package; what follows is for looking at what it did.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from . import metrics as metrics
from . import reference as reference  # gives the operators their eager meaning
from .backend import alignedkv
from .errors import (
    AlignedKVError,
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
    "metrics",
    "AlignedKVError",
    "CacheTypeError",
    "DeclinedError",
    "OptionValueError",
    "StatisticsDisabledError",
    "UnknownInductorOptionError",
    "UnknownModeError",
    "UnknownOptionError",
    "__version__",
]
