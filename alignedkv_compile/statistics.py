"""What the reads did, with ``options={"stats": True}``: bytes of KV cache read, and how far off an output may be.

Each compiled graph owns an int64 tensor of counters, and with ``guarantee="worst_case"`` a float32 tensor of certificates;
both have one row per attention site, which the generated kernels write to. The layer of a row is its order in the graph.
Graphs with equally many sites (recompiles of the same model) are one: bytes are added up, the worst certificates are the
largest of all, and the last ones are those of the graph that was called last.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from .contract import RewrittenGraph
from .counter_ledger import CounterLedger, GraphKey
from .errors import StatisticsDisabledError
from .ops import COUNTER_FIELDS
from .shadow import SHADOW_LOG


@dataclass(frozen=True)
class LayerStatistics:
    """Counters and certificates of one attention site, or of all.

    A certificate bounds the error of a query head's output ``o`` in units of ``u * ||o||``, where ``u`` is the unit roundoff
    of the cache's dtype or of the option ``accuracy``: the largest over batch and query rows, 0 where all bits were read.

    Attributes:
        calls, ..., value_rows_full: those of ``ops.COUNTER_FIELDS``; a total is their sum.
        certificates: of each query head in the last call; of all layers' heads, one layer after the other, in a total. Empty
            with ``guarantee="expected"``.
        worst_certificates: the largest since the last :func:`reset_stats`, likewise.
    """

    calls: int = 0
    bytes_read: int = 0
    bytes_full: int = 0
    rows: int = 0
    key_rows_mid: int = 0
    key_rows_full: int = 0
    value_rows_hi: int = 0
    value_rows_mid: int = 0
    value_rows_full: int = 0
    certificates: tuple[float, ...] = ()
    worst_certificates: tuple[float, ...] = ()

    @property
    def fraction(self) -> float:
        """``bytes_read / bytes_full``; 1.0 when nothing was read at all."""
        return self.bytes_read / self.bytes_full if self.bytes_full else 1.0

    @property
    def certificate(self) -> float | None:
        """Largest of :attr:`certificates`; None with ``guarantee="expected"``."""
        return max(self.certificates, default=None)

    @property
    def worst_certificate(self) -> float | None:
        """Largest of :attr:`worst_certificates`; None with ``guarantee="expected"``."""
        return max(self.worst_certificates, default=None)

    def to_dict(self) -> dict[str, object]:
        """Plain data: numbers, None, lists and dicts only."""
        properties = ("fraction", "certificate", "worst_certificate")
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {**values, **{name: getattr(self, name) for name in properties}}


@dataclass(frozen=True)
class Statistics(LayerStatistics):
    """Totals.

    Attributes:
        tolerance: what certificates are held to, the largest if graphs differ; None with ``guarantee="expected"``.
        layers: the statistics of each attention site, in the order of the graph.
    """

    tolerance: float | None = None
    layers: tuple[LayerStatistics, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Plain data: numbers, None, lists and dicts only."""
        return {**super().to_dict(), "layers": [layer.to_dict() for layer in self.layers]}

    def __str__(self) -> str:
        lines = [f"alignedkv: read {self.bytes_read:,} of {self.bytes_full:,} bytes of KV cache ({self.fraction:.1%})"]
        worst = self.worst_certificate
        if worst is not None:
            lines.append(f"  certified: every output within {worst:.3g} u*||o||, tolerance {self.tolerance:g}")
        lines += [
            f"  layer {index}: {layer.fraction:.1%} of {layer.bytes_full:,} bytes in {layer.calls} calls"
            for index, layer in enumerate(self.layers)
        ]
        return "\n".join(lines)


class GraphStatistics:
    """The tensors that the reads of one compiled graph write to; they die with the graph.

    Args:
        graph: names the tensors among its inputs.
        tolerance: the user's.
        function: what the graph was traced from, "" when that is not known.

    Attributes:
        key: under which the counters are added up.
        counters: int64 ``[sites, len(COUNTER_FIELDS)]``, or None when nothing is counted.
        bounds: float32 ``[sites, 2, heads]``, see ``ops.certified_read_attention``, or None when reads are not certified.
        query_heads: for each site, how many columns of ``bounds`` are its own.
        last_call: when the graph was called last, as a number that grows from call to call of any graph.
    """

    def __init__(self, graph: RewrittenGraph, tolerance: float, function: str = "") -> None:
        binding = graph.statistics
        self.counters = _zeros(graph, binding.counters_input)
        self.bounds = _zeros(graph, binding.bounds_input)
        tensors = {binding.counters_input: self.counters, binding.bounds_input: self.bounds}
        self._bound = [(index, t) for index, t in tensors.items() if index is not None and t is not None]
        self.query_heads = binding.query_heads
        self.tolerance = tolerance
        self.last_call = -1
        self.key = GraphKey(function, len(binding.query_heads))
        if self.counters is not None:
            _ALL.add(self)
            _LEDGER.open(self, self.key, self.counters)

    def bind(self, inputs: list[object]) -> None:
        """Put the tensors in their places among the inputs of a call."""
        for index, tensor in self._bound:
            inputs[index] = tensor
        self.last_call = next(_CALLS)

    def reset(self) -> None:
        for _, tensor in self._bound:
            tensor.zero_()

    def certificates(self, site: int) -> tuple[list[float], list[float]]:
        """One site's certificates of the last call, and the largest since the last reset, by query head."""
        assert self.bounds is not None
        last, worst = self.bounds[site, :, : self.query_heads[site]].tolist()
        return last, worst


_ALL: weakref.WeakSet[GraphStatistics] = weakref.WeakSet()
_CALLS = itertools.count()
_LEDGER: CounterLedger[GraphStatistics] = CounterLedger()


def _zeros(graph: RewrittenGraph, index: int | None) -> torch.Tensor | None:
    """A tensor for one of the graph's inputs."""
    if index is None:
        return None
    example = graph.example_inputs[index]
    assert isinstance(example, torch.Tensor)
    with torch.inference_mode(False):
        return torch.zeros(tuple(map(int, example.shape)), dtype=example.dtype, device=example.device)


def stats() -> Statistics:
    """What was read by all live graphs compiled with ``stats=True`` since the last :func:`reset_stats`.

    Raises:
        StatisticsDisabledError: there is no such graph.
    """
    graphs = sorted(_ALL, key=lambda graph: (len(graph.query_heads), graph.last_call))
    if not graphs:
        raise StatisticsDisabledError
    groups = itertools.groupby(graphs, lambda graph: len(graph.query_heads))
    layers = tuple(layer for _, group in groups for layer in _layers(list(group)))
    return Statistics(
        **{name: sum(getattr(layer, name) for layer in layers) for name in COUNTER_FIELDS},
        certificates=tuple(itertools.chain.from_iterable(layer.certificates for layer in layers)),
        worst_certificates=tuple(itertools.chain.from_iterable(layer.worst_certificates for layer in layers)),
        tolerance=max((graph.tolerance for graph in graphs if graph.bounds is not None), default=None),
        layers=layers,
    )


def _layers(graphs: Sequence[GraphStatistics]) -> Iterator[LayerStatistics]:
    """Graphs with equally many sites as one, in the order of their last calls."""
    counters = torch.stack([graph.counters.cpu() for graph in graphs if graph.counters is not None]).sum(0)
    certified = [graph for graph in graphs if graph.bounds is not None]
    for site, row in enumerate(counters.tolist()):
        certificates = [graph.certificates(site) for graph in certified]
        worst = itertools.zip_longest(*(worst for _, worst in certificates), fillvalue=0.0)
        yield LayerStatistics(
            **dict(zip(COUNTER_FIELDS, row, strict=True)),
            certificates=tuple(certificates[-1][0]) if certificates else (),
            worst_certificates=tuple(map(max, worst)),
        )


def reset_stats() -> None:
    """Set all counters and certificates to zero, and forget the shadow checks so far."""
    for graph in list(_ALL):
        graph.reset()
    _LEDGER.reset()
    SHADOW_LOG.reset()


def counter_totals() -> dict[GraphKey, list[list[int]]]:
    """Counters ``[sites][COUNTER_FIELDS]`` since the last :func:`reset_stats`, those of graphs that are gone included: what
    :func:`stats` shows of the living, as sums that never fall. Empty when nothing is counted."""
    return _LEDGER.totals()


def certificate_ratios() -> dict[GraphKey, list[float]]:
    """For each site of the living graphs that certify and count, its worst certificate over the tolerance."""
    ratios: dict[GraphKey, list[float]] = {}
    for key, graph in _LEDGER.owners():
        if graph.bounds is not None and graph.tolerance > 0:
            worst = (graph.bounds[:, 1].amax(-1) / graph.tolerance).tolist()
            ratios[key] = list(map(max, worst, ratios.get(key, worst)))
    return ratios
