"""Bytes of KV cache read, against what streaming the cache in its own dtype would read: ``options={"stats": True}``.

Each graph compiled with ``stats`` owns an int64 tensor of counters, one row per attention site, which the generated
kernels add to. The layer of a row is its order in the graph; graphs with equally many sites (recompiles of the same
model) are added up.
"""

from __future__ import annotations

import weakref
from dataclasses import asdict, dataclass

import torch

from .errors import StatisticsDisabledError
from .ops import COUNTER_FIELDS


@dataclass(frozen=True)
class LayerStatistics:
    """Counters of one attention site, or the sum over all; the fields are those of ``ops.COUNTER_FIELDS``."""

    calls: int = 0
    bytes_read: int = 0
    bytes_full: int = 0
    rows: int = 0
    key_rows_mid: int = 0
    key_rows_full: int = 0
    value_rows_hi: int = 0
    value_rows_mid: int = 0
    value_rows_full: int = 0

    @property
    def fraction(self) -> float:
        """``bytes_read / bytes_full``; 1.0 when nothing was read at all."""
        return self.bytes_read / self.bytes_full if self.bytes_full else 1.0


@dataclass(frozen=True)
class Statistics(LayerStatistics):
    """Totals, and ``layers``: the same per attention site, in the order of the graph."""

    layers: tuple[LayerStatistics, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Plain data: numbers, lists and dicts only."""
        layers = [{**asdict(layer), "fraction": layer.fraction} for layer in self.layers]
        return {**asdict(self), "fraction": self.fraction, "layers": layers}

    def __str__(self) -> str:
        lines = [f"alignedkv: read {self.bytes_read:,} of {self.bytes_full:,} bytes of KV cache ({self.fraction:.1%})"]
        lines += [
            f"  layer {index}: {layer.fraction:.1%} of {layer.bytes_full:,} bytes in {layer.calls} calls"
            for index, layer in enumerate(self.layers)
        ]
        return "\n".join(lines)


class Counters:
    """The counter tensor of one compiled graph: int64 ``[sites, len(COUNTER_FIELDS)]``; dies with the graph."""

    def __init__(self, sites: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.tensor = torch.zeros(sites, len(COUNTER_FIELDS), dtype=torch.int64, device=device)
        _ALL.add(self)


_ALL: weakref.WeakSet[Counters] = weakref.WeakSet()


def stats() -> Statistics:
    """Bytes read by all live graphs compiled with ``stats=True`` since the last :func:`reset_stats`.

    Raises:
        StatisticsDisabledError: there is no such graph.
    """
    by_sites: dict[int, torch.Tensor] = {}
    for counters in list(_ALL):
        tensor = counters.tensor.cpu()
        sites = tensor.shape[0]
        by_sites[sites] = by_sites[sites] + tensor if sites in by_sites else tensor.clone()
    if not by_sites:
        raise StatisticsDisabledError
    rows = torch.cat([by_sites[sites] for sites in sorted(by_sites)])
    layers = tuple(LayerStatistics(**dict(zip(COUNTER_FIELDS, row, strict=True))) for row in rows.tolist())
    return Statistics(**dict(zip(COUNTER_FIELDS, rows.sum(0).tolist(), strict=True)), layers=layers)


def reset_stats() -> None:
    """Set all counters to zero."""
    for counters in list(_ALL):
        counters.tensor.zero_()
