"""What was measured on this machine, kept beside Inductor's caches: a JSON file for each machine and version of the kernels."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .. import lowering, torch_private
from ..break_even import ReadShape
from ..lowering.isa import chosen_isa
from ..processor import processor
from . import inputs, measure
from .crossover import Timing, break_even, least_context
from .measure import Accuracy, heads_of_a_call

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """Reads that have one break-even context: what a measurement is kept under.

    Attributes:
        dtype: of the cache, without ``torch.``.
        heads: KV heads of a timed call.
        rows_per_head, key_dim, value_dim: as in :class:`~alignedkv_compile.break_even.ReadShape`.
        tolerance, unit_roundoff: as in :class:`.measure.Accuracy`.
    """

    dtype: str
    heads: int
    rows_per_head: int
    key_dim: int
    value_dim: int
    tolerance: float
    unit_roundoff: float

    def __str__(self) -> str:
        dims = str(self.key_dim) if self.key_dim == self.value_dim else f"{self.key_dim}+{self.value_dim}"
        return (
            f"{self.dtype}, {self.rows_per_head} query row{'s' if self.rows_per_head != 1 else ''} per KV head, "
            f"head dimension {dims}, "
            f"{self.heads} KV head{'s' if self.heads != 1 else ''} a call, "
            f"tolerance {self.tolerance:g} of roundoff {self.unit_roundoff:.3g}"
        )


def kind_of(read: ReadShape, accuracy: Accuracy) -> Kind:
    """What a read's measurement is kept under."""
    return Kind(
        str(read.dtype).removeprefix("torch."),
        heads_of_a_call(read),
        read.rows_per_head,
        read.key_dim,
        read.value_dim,
        accuracy.tolerance,
        accuracy.unit_roundoff,
    )


@dataclass(frozen=True)
class Record:
    """One kind of read, measured."""

    kind: Kind
    timings: tuple[Timing, ...]

    @property
    def least_context(self) -> int:
        """See :func:`.crossover.least_context`."""
        return least_context(self.timings)

    @property
    def break_even(self) -> float:
        """See :func:`.crossover.break_even`."""
        return break_even(self.timings)


class Records:
    """The measurements of this machine: in memory, and in :meth:`path` for the next process."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._known: dict[tuple[str, Kind], Record] = {}

    def find_or(self, kind: Kind, timed: Callable[[], tuple[Timing, ...]]) -> Record:
        """The record of a kind; the first time on a machine ``timed`` makes it."""
        machine = machine_key()
        with self._lock:
            if (machine, kind) not in self._known:
                self._known |= {(machine, record.kind): record for record in self.all()}
            if (machine, kind) not in self._known:
                record = Record(kind, timed())
                self._known[machine, kind] = record
                self._write([*self.all(), record])
            return self._known[machine, kind]

    def all(self) -> list[Record]:
        """Those of the file; none where there is no file of ours."""
        try:
            return [_record(entry) for entry in json.loads(self.path().read_text())["records"]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("%s holds no measurements that can be read (%s): they are made anew", self.path(), error)
            return []

    @staticmethod
    def path() -> Path:
        """The file of this machine, instruction set, threads, version of torch and of the kernels, and way of timing them."""
        return torch_private.cache_folder() / "alignedkv" / f"costs-{machine_key()}.json"

    def _write(self, records: list[Record]) -> None:
        """Replace the file in one step; one that cannot be written is a warning, and a measurement more next time."""
        path = self.path()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
            with os.fdopen(handle, "w") as file:
                json.dump({"machine": machine(), "records": [asdict(record) for record in records]}, file, indent=1)
            os.replace(name, path)
        except OSError as error:
            _log.warning("measurements could not be kept in %s: %s", path, error)


def machine() -> dict[str, str]:
    """What measurements hold for."""
    return {
        "processor": processor()[0],
        "instructions": chosen_isa(),
        "threads": str(torch.get_num_threads()),
        "torch": str(torch.__version__),
        "kernels": lowering.source_hash().hex(),
        "timed by": _method(),
    }


@functools.cache
def _method() -> str:
    """Hash of what is timed and how."""
    digest = hashlib.sha256()
    for module in (inputs, measure):
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()


def machine_key() -> str:
    """A short name of :func:`machine`."""
    return hashlib.sha256(repr(sorted(machine().items())).encode()).hexdigest()[:16]


def _record(entry: Mapping[str, object]) -> Record:
    kind, timings = entry["kind"], entry["timings"]
    return Record(Kind(**kind), tuple(_timing(timing) for timing in timings))  # type: ignore[arg-type, attr-defined]


def _timing(entry: Mapping[str, object]) -> Timing:
    layers = tuple((share, ratio) for share, ratio in entry["layers"])  # type: ignore[attr-defined]
    return Timing(**{**entry, "layers": layers})  # type: ignore[arg-type]


RECORDS: Records = Records()
"""The process's."""
