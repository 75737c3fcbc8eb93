"""``aligned_read_attention`` as a chain of Triton kernels: score, coarse, thresholds, refine, exact, values, stream, combine.

Each step of docs/policy.md that needs a sum over the whole context ends a kernel. What is decided there stays on the device:
``STATE`` says per pair whether the cache is streamed instead, and kernels that have nothing to do return at once. So there is
no synchronisation with the host, no size that depends on data, and every address is fixed, as CUDA graphs want it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch._inductor import config, ir
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch.utils._sympy.functions import FloorDiv

from ... import precision
from ...layout import BLOCK_ROWS, COARSE_STEP, CODE_RANGE, MIDDLE_STEP, SCALES_BYTES, ArenaLayout
from .constants import head_constants, power_of_two
from .kernel import Launch, contiguous, emit, scratch
from .tuning import for_kernel, read_launches, splits

STATISTIC_FIELDS = 9
LIMIT_FIELDS = 10
COUNTERS = 11
SMALL = (Launch(0, 4, 1),)
"""Launch of the kernels that do not walk the context."""
EMULATED_PROCESSORS = 2
"""Multiprocessors that a CPU stands for when its Triton code is interpreted."""


@dataclass(frozen=True)
class Settings:
    """What is fixed when the kernels are generated; as in the operator's schema."""

    scale: float
    tolerance: float
    unit_roundoff: float
    min_context: int
    length: sympy.Expr


class Read:
    """The kernels of one call.

    Args:
        inputs: IR nodes: query, key, value, and planes, mask where the call has them.
        mask_strides: strides of the mask, 0 where it broadcasts.
        mask_floor: a floating mask at or below it prohibits.
        settings: the call's options.
    """

    def __init__(
        self, inputs: Mapping[str, ir.IRNode], mask_strides: Sequence[sympy.Expr], mask_floor: float, settings: Settings
    ) -> None:
        static = V.graph.sizevars.guard_int
        query, key, value = inputs["query"], inputs["key"], inputs["value"]
        self.inputs = {name.upper(): node for name, node in inputs.items()}
        self.settings = settings
        batch, query_heads, queries, key_dim = query.get_size()
        heads = static(key.get_size()[1])
        device = query.get_device()
        assert device is not None
        self.device = device
        self.arena = ArenaLayout(1, 1, static(key_dim), static(value.get_size()[3]))
        self.pairs = sympy.sympify(batch * heads)
        group, queries = static(query_heads) // heads, static(queries)
        rows = group * queries
        self.padded = max(16, power_of_two(rows))
        self.generation = 0 if _is_hip() else _generation(self.device)
        self.splits = splits(V.graph.sizevars.optimization_hint(self.pairs), _processors(self.device))
        mask = inputs.get("mask")
        kind = 0 if mask is None else 1 if mask.get_dtype() == torch.bool else 2
        self.masked = kind > 0
        element = key.get_dtype()
        middle_key, middle_value = precision.middle_ratios(self.arena, element.itemsize)
        query_size = 2 * self.padded * int(str(head_constants(self.arena)["KHP"]))
        step = {bits: precision.evaluate("value_coefficient", b=bits, D=self.arena.value_dim) for bits in (4, 8)}
        self.constants: dict[str, object] = {
            **head_constants(self.arena),
            "HEADS": heads,
            "GROUP": group,
            "QUERIES": queries,
            "M": rows,
            "MP": self.padded,
            "SPLITS": self.splits,
            "SP": power_of_two(self.splits),
            "GRID_Y": self.splits,
            "BLOCK": BLOCK_ROWS,
            "SCAN": 128,
            "COLUMNS": min(64, power_of_two(self.arena.value_dim)) if self.arena.value_dim > 16 else 16,
            "HAS_MASK": kind,
            "HAS_STATE": False,
            "FLOOR": mask_floor,
            "SCALE": settings.scale,
            "ABS_SCALE": abs(settings.scale),
            "ALPHA": settings.tolerance,
            "ROUNDOFF": settings.unit_roundoff,
            "MIN_CONTEXT": settings.min_context,
            "MIN_NORM": precision.NORM_RANGE[0],
            "MAX_NORM": precision.NORM_RANGE[1],
            "LARGEST_SHIFT": float(precision.LARGEST_SHIFT),
            "FRACTION": float(precision.STREAM_FRACTION),
            "COARSE": COARSE_STEP / CODE_RANGE,
            "MIDDLE": MIDDLE_STEP / CODE_RANGE,
            "VALUE_4": step[4] * middle_value,
            "VALUE_8": step[8],
            "KEY_MIDDLE_RATIO": middle_key,
            "VALUE_MIDDLE_RATIO": middle_value,
            "SCALES_BYTES": SCALES_BYTES,
            "PRECISION": "'ieee'" if _is_hip() else "'tf32'",
            "SHORT": element.itemsize == 2,
            "FULL_KEY": self.arena.key_dim * element.itemsize,
            "FULL_VALUE": self.arena.value_dim * element.itemsize,
            "FIELDS": STATISTIC_FIELDS,
            "LIMIT_FIELDS": LIMIT_FIELDS,
            "COUNTERS": COUNTERS,
            "TERM_RATIO": float(precision.TERM_RATIO),
            "SECOND_TERM": query_size + 4 * self.padded,
            "HEAD_SIZE": precision.QUERY_TERMS * query_size + (3 + precision.QUERY_TERMS) * self.padded,
        }
        self.sizes = [self.pairs, settings.length, key.get_size()[2], *mask_strides, *query.get_stride()]
        self.sizes += [*key.get_stride()[:3], *value.get_stride()[:3]]
        dim = max(self.arena.key_dim, self.arena.value_dim)
        self.launches = read_launches(dim, self.padded, choose=bool(config.max_autotune))

    def emit(
        self,
        name: str,
        inputs: Mapping[str, ir.IRNode],
        mutated: Sequence[str],
        output: ir.Layout,
        launches: Sequence[Launch] | None = None,
        **constants: object,
    ) -> ir.TensorBox:
        """One kernel; those that look at the mask get its spans, and itself where ``inputs`` names it."""
        merged = {**self.constants, **constants}
        return emit(
            name, inputs, mutated, output, self.sizes, merged, launches or [for_kernel(name, self.launches[0], self.generation)]
        )

    def floats(self, *size: object) -> ir.FixedLayout:
        """A fresh float32 buffer ``[pairs, *size]``."""
        return contiguous(self.device, torch.float32, self.pairs, *size)

    def prepare(self) -> None:
        """The query in int8, for planes, and the attended span."""
        inputs = {"QUERY": self.inputs["QUERY"]}
        self.spans: dict[str, ir.IRNode] = {}
        if self.masked:
            self.spans = {"SPANS": scratch(self.device, torch.int32, self.pairs, self.splits, 2 + self.padded)}
            inputs |= self.with_mask()
        aligned = "PLANES" in self.inputs
        output = self.floats(self.constants["HEAD_SIZE"]) if aligned else contiguous(self.device, torch.int32, 1)
        self.head = self.emit("prepare", inputs, list(self.spans), output, SMALL, NEEDS_QUERY=aligned)

    def with_mask(self) -> dict[str, ir.IRNode]:
        return {**self.spans, "MASK": self.inputs["MASK"]} if self.masked else {}

    def read_aligned(self) -> None:
        """Steps 1 to 5 of docs/policy.md; ``STATE`` ends up 1 for the pairs that are to be streamed."""
        rows = FloorDiv(self.settings.length + (BLOCK_ROWS - 1), BLOCK_ROWS) * BLOCK_ROWS
        m, dim, device = self.constants["M"], self.arena.value_dim, self.device
        data = {name: self.inputs[name] for name in ("PLANES", "QUERY", "KEY", "VALUE")}
        flags = {"FLAGS": scratch(device, torch.uint8, self.pairs, rows)}
        statistics = {"STATISTICS": scratch(device, torch.float32, self.pairs, self.splits, STATISTIC_FIELDS, self.padded)}
        state = {"STATE": scratch(device, torch.int32, self.pairs)}
        counts = {"COUNTS": scratch(device, torch.int32, self.pairs, self.splits, COUNTERS)}
        planes, head = {"PLANES": data["PLANES"]}, {"HEAD": self.head}
        exact_keys = {"QUERY": data["QUERY"], "KEY": data["KEY"]}

        scores = self.emit(
            "score",
            {**head, **planes, **exact_keys, **flags, **statistics, **state, **self.with_mask()},
            ["FLAGS", "STATISTICS", "STATE"],
            self.floats(m, rows),
        )
        walked = {"SCORES": scores, **flags}
        parts = self.emit(
            "coarse",
            {**head, **planes, "VALUE": data["VALUE"], **walked, **statistics, **state, **counts, **self.spans},
            ["FLAGS", "COUNTS"],
            self.floats(self.splits, m, dim),
        )
        limits = self.emit(
            "thresholds",
            {**head, "PARTS": parts, **statistics, **state},
            ["STATE"],
            self.floats(LIMIT_FIELDS, self.padded),
            SMALL,
            GRID_Y=1,
        )
        sums = self.emit(
            "refine",
            {**head, **planes, **walked, "LIMITS": limits, **state, **counts, **self.spans},
            ["SCORES", "FLAGS", "COUNTS"],
            self.floats(self.splits, 3, self.padded),
        )
        totals = self.emit(
            "exact",
            {**planes, **exact_keys, **walked, "LIMITS": limits, "SUMS": sums, **state, **counts, **self.with_mask()},
            ["SCORES", "FLAGS", "LIMITS", "STATE", "COUNTS"],
            self.floats(self.splits, self.padded),
        )
        values = self.emit(
            "values",
            {**planes, "VALUE": data["VALUE"], **walked, "LIMITS": limits, "TOTALS": totals, **state, **counts, **self.spans},
            ["COUNTS"],
            self.floats(self.splits, m, dim),
        )
        self.aligned: dict[str, ir.IRNode] = {"PARTS": values, "TOTALS": totals, **state}
        self.state, self.counts = state, counts

    def read(self, output: ir.Layout) -> ir.TensorBox:
        """The whole call."""
        self.aligned, self.state, self.counts, self.spans = {}, {}, {}, {}
        aligned = "PLANES" in self.inputs
        if aligned or self.masked:
            self.prepare()
        if aligned:
            self.read_aligned()
        self.tops = scratch(self.device, torch.float32, self.pairs, self.splits, 3, self.padded)
        data = {name: self.inputs[name] for name in ("QUERY", "KEY", "VALUE")}
        streamed = self.emit(
            "stream",
            {**data, "TOPS": self.tops, **self.state, **self.with_mask()},
            ["TOPS"],
            self.floats(self.splits, self.constants["M"], self.arena.value_dim),
            self.launches,
            HAS_STATE=aligned,
        )
        chunks = -(-self.arena.value_dim // int(str(self.constants["COLUMNS"])))
        inputs = {"STREAMED": streamed, "TOPS": self.tops, **self.aligned}
        return self.emit("combine", inputs, [], output, SMALL, HAS_STATE=aligned, GRID_Y=chunks)

    def count(self, counters: ir.IRNode, site: int) -> None:
        """Add what was read to row ``site`` of ``counters``."""
        aligned = "PLANES" in self.inputs
        inputs = {"COUNTERS_OUT": counters, "TOPS": self.tops}
        if aligned:
            inputs |= {**self.counts, **self.state}
        dummy = contiguous(self.device, torch.int32, 1)
        self.emit("count", inputs, ["COUNTERS_OUT"], dummy, SMALL, HAS_STATE=aligned, SITE=site)


def _processors(device: torch.device) -> int:
    count = DeviceProperties.create(device).multi_processor_count
    return EMULATED_PROCESSORS if device.type == "cpu" or not count else count


def _generation(device: torch.device) -> int:
    return int(DeviceProperties.create(device).major or 0)


def _is_hip() -> bool:
    return torch.version.hip is not None
