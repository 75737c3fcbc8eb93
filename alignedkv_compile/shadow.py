"""Shadow checks: one call in N also computes attention from all bits, and what the read was off by is held to the tolerance.

The compiled graph returns what its reads read and made (``passes/shadow_outputs.py``). A checked call computes the same
attention once more in eager torch, by the function that says what the operator means at full precision: an independent code
path, so that a stale plane or a defect of a generated kernel shows as well as a tolerance that the model's data do not keep to.
The caller's result is the compiled graph's in either case.

With ``o`` the exact output row, ``d`` what the read was off by and ``r`` what plain attention in float32, rounded to the
output's dtype, is off by, the read has added ``sqrt(|d|^2 - |r|^2)``. Over what the tolerance allows the row,
``alpha * kappa * u * |o|`` (docs/policy.md), that is the row's ratio; a layer's is the rms over its rows, or the largest with
``guarantee="worst_case"``, which allows ``alpha * u * |o|``. At tolerance 0 errors are in units of the rounding error itself.
Where that is float32's, sums in another order are off by several of it: what they are off by in plain attention is allowed too.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .contract import PackedRows, ShadowRead, Where
from .counter_ledger import GraphKey
from .precision import KAPPA
from .reference_head import ReadCounts, head_calls, read_full
from .reference_write import cache_rows

_log = logging.getLogger(__name__)

FLOAT32_SUFFICES = 2.0**-12
"""Roundoff from which on float32 counts as exact; below it the check also computes in float64."""


@dataclass(frozen=True)
class ShadowCheck:
    """One checked call.

    Attributes:
        graph: what was compiled, and how many attention sites it has, as in the metrics.
        call: number of the call among those of its graph, from 1.
        errors: error over tolerance of each layer that was read, by the order of its site in the graph. Infinite where the read
            is not finite and exact attention is.
        tolerance: the user's.
    """

    graph: str
    call: int
    errors: Mapping[int, float]
    tolerance: float

    @property
    def worst(self) -> float:
        """The largest error over tolerance."""
        return max(self.errors.values(), default=0.0)


Callback = Callable[[ShadowCheck], object]


@dataclass
class ShadowRecord:
    """All checks of the graphs of one key.

    Attributes:
        checks: how many.
        last, worst: error over tolerance by layer; empty before the first check.
        exceeded: checks with an error above 1, by layer.
    """

    checks: int = 0
    last: dict[int, float] = field(default_factory=dict)
    worst: dict[int, float] = field(default_factory=dict)
    exceeded: dict[int, int] = field(default_factory=dict)


class ShadowLog:
    """Every check of the process, and who wants to hear of the next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: dict[GraphKey, ShadowRecord] = {}
        self._callbacks: list[Callback] = []

    def open(self, key: GraphKey, layers: Sequence[int]) -> None:
        """List a graph whose calls will be checked."""
        with self._lock:
            record = self._records.setdefault(key, ShadowRecord())
            for layer in layers:
                record.exceeded.setdefault(layer, 0)

    def add(self, key: GraphKey, check: ShadowCheck) -> None:
        """Remember a check and tell whoever asked."""
        with self._lock:
            record = self._records.setdefault(key, ShadowRecord())
            record.checks += 1
            for layer, error in check.errors.items():
                record.last[layer] = error
                record.worst[layer] = max(error, record.worst.get(layer, 0.0))
                record.exceeded[layer] = record.exceeded.get(layer, 0) + (error > 1)
            callbacks = tuple(self._callbacks)
        for callback in callbacks:
            callback(check)

    def records(self) -> dict[GraphKey, ShadowRecord]:
        """A copy."""
        with self._lock:
            return {
                key: ShadowRecord(one.checks, dict(one.last), dict(one.worst), dict(one.exceeded))
                for key, one in self._records.items()
            }

    def reset(self) -> None:
        """Forget what was found; graphs go on being checked."""
        with self._lock:
            for record in self._records.values():
                record.checks, record.last, record.worst = 0, {}, {}
                record.exceeded = dict.fromkeys(record.exceeded, 0)

    def call(self, callback: Callback) -> Callable[[], None]:
        """See :func:`on_shadow`."""
        with self._lock:
            self._callbacks.append(callback)

        def remove() -> None:
            with self._lock:
                if callback in self._callbacks:
                    self._callbacks.remove(callback)

        return remove


SHADOW_LOG = ShadowLog()
"""The process's."""


def on_shadow(callback: Callback) -> Callable[[], None]:
    """Call ``callback`` with the :class:`ShadowCheck` of every call that ``options={"shadow_every": N}`` checks from now on.

    It is called by the thread that decodes, when the call is otherwise done. What it raises, the call raises.

    Returns:
        A function that undoes this.
    """
    return SHADOW_LOG.call(callback)


class Shadow:
    """The checks of one compiled graph.

    Args:
        reads: where its reads' operands are.
        every: one call in so many is checked; at least 1.
        key: under which checks are remembered.
        name: of the graph, for warnings.
        tolerance, certified: the user's.
    """

    def __init__(
        self, reads: Sequence[ShadowRead], every: int, key: GraphKey, name: str, tolerance: float, *, certified: bool
    ) -> None:
        self._reads = reads
        self._every = every
        self._key, self._name = key, name
        self._tolerance, self._certified = tolerance, certified
        self._calls = 0
        self._warned: set[int] = set()
        SHADOW_LOG.open(key, [read.site for read in reads])

    def check(self, inputs: Sequence[object], outputs: Sequence[object]) -> ShadowCheck | None:
        """Compare, if it is this call's turn.

        Args:
            inputs: of the rewritten graph, as the call has left them; before anything else happens to the caches.
            outputs: those that were added for this.
        """
        self._calls += 1
        if self._calls % self._every:
            return None

        def find(place: Where | None) -> object:
            return None if place is None else (outputs if place.is_output else inputs)[place.index]

        try:
            with torch.no_grad():
                errors = {read.site: self._error(read, find) for read in self._reads}
        except Exception as error:  # the caller's result does not depend on the check
            _log.warning("%s: a shadow check failed, %s: %s", self._name, type(error).__name__, error, exc_info=True)
            return None
        return ShadowCheck(str(self._key), self._calls, errors, self._tolerance)

    def publish(self, check: ShadowCheck) -> None:
        """Warn of layers that exceed the tolerance for the first time, remember the check, and tell whoever asked."""
        for layer, error in check.errors.items():
            if error > 1 and layer not in self._warned:
                self._warned.add(layer)
                _log.warning(
                    "%s: layer %d: a shadow check found %.3g times the error that tolerance %g allows (call %d; later ones are"
                    " counted, see docs/monitoring.md)",
                    self._name,
                    layer,
                    error,
                    check.tolerance,
                    check.call,
                )
        SHADOW_LOG.add(self._key, check)

    def _error(self, read: ShadowRead, find: Callable[[Where | None], object]) -> float:
        tensors: dict[str, Any] = {name: find(getattr(read, name)) for name in ("query", "mask", "sinks", "result")}

        def number(value: int | Where) -> int:
            return value if isinstance(value, int) else int(find(value))  # type: ignore[call-overload]

        length, rows = number(read.length), read.rows
        if isinstance(rows, PackedRows):
            batch, key_dim = tensors["query"].shape[0], tensors["query"].shape[3]
            constants = (batch, rows.heads, key_dim, rows.value_dim, rows.dtype, rows.storage)
            planes: Any = find(rows.planes)
            _, _, tensors["key"], tensors["value"] = cache_rows(planes, *constants, number(rows.capacity), length)
        else:
            tensors |= {"key": find(rows.key), "value": find(rows.value)}
        return read_error(
            **tensors,
            length=length,
            scale=read.scale,
            softcap=read.softcap,
            tolerance=self._tolerance,
            unit_roundoff=read.unit_roundoff,
            certified=self._certified,
        )


def read_error(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    result: torch.Tensor,
    *,
    length: int,
    scale: float,
    softcap: float,
    tolerance: float,
    unit_roundoff: float,
    certified: bool,
) -> float:
    """Error over tolerance of one read, see above; waits for the device.

    Args:
        query, key, value, mask, sinks, length, scale, softcap, tolerance, unit_roundoff: the read's, see
            :data:`alignedkv_compile.ops.aligned_read_attention`.
        result: what it returned, ``[B, Hq, Q, Dv]``.
        certified: whether the tolerance bounds every row.
    """
    dtype = torch.float32 if unit_roundoff >= FLOAT32_SUFFICES else torch.float64
    exact = torch.empty(result.shape, dtype=dtype, device=result.device)
    plain = exact if dtype is torch.float32 else torch.empty_like(exact)
    group, query_rows = query.shape[1] // key.shape[1], query.shape[2]
    for _, b, selected, call in head_calls(query, key, value, mask, sinks, length, scale, softcap, tolerance, unit_roundoff):
        exact[b, selected] = read_full(call, ReadCounts(), dtype).view(group, query_rows, -1)
        if plain is not exact:
            plain[b, selected] = read_full(call, ReadCounts(), torch.float32).view(group, query_rows, -1).to(dtype)
    off = (result.to(dtype) - exact).square().sum(-1)
    rounding = (plain.to(result.dtype).to(dtype) - exact).square().sum(-1)
    arithmetic = (plain - exact).norm(dim=-1)
    squared_norm = exact.square().sum(-1)
    usable = torch.isfinite(squared_norm) & (squared_norm > 0)
    if not bool(usable.any()):
        return 0.0
    unit = (tolerance or 1.0) * unit_roundoff * (1.0 if certified else float(KAPPA))
    squares = ((off - rounding) / (unit * squared_norm.sqrt() + arithmetic).square())[usable]
    squares = torch.where(torch.isfinite(squares), squares, math.inf)
    return math.sqrt(max(float(squares.max() if certified else squares.mean()), 0.0))
