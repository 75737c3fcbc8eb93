"""``aligned_read_attention`` and ``packed_read_attention`` as three Triton kernels, scan, finish and repair; all bits as stream
and combine. Before the scan of a lossless cache, raw reads the rows that have no bits which say less than all.

``scan`` scores every attended row from the 4-bit plane of K and, by the last program of a (batch, KV head) pair, turns the sums
over all weights into what every addend is held to. ``finish`` chooses rows by that, reads them and adds them up; the last
program of a pair combines. ``repair`` streams what turns out to be cheaper, or right, to read in full. Which program is last is
counted in the arena. There is no synchronisation with the host, no size
that depends on data, every address is fixed, as CUDA graphs want it, and no sum depends on the order in which programs ran.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import sympy
import torch

from ...inductor_private import FloorDiv, V, ir
from ...layout import BLOCK_ROWS
from ..constants import option_constants, policy_constants
from .kernel import contiguous, emit, scratch
from .shapes import head_constants, power_of_two
from .targets import has_ptx, has_tensor_memory, is_hip, processors
from .tuning import read_launches, splits

if TYPE_CHECKING:
    from ..attention import Constants

STATISTIC_FIELDS = 9
LIMIT_FIELDS = 10
COUNTERS = 9
PROHIBITED = -32768
"""Stored score of a row that the query row does not attend to."""
LARGEST_GROUP = 32
"""Query rows of a KV head (group size times query length) up to which planes are read; more share the cache's own rows."""
LARGEST_HEAD = 256
"""Head dimension up to which planes are read."""


class Read:
    """The kernels of one call.

    Args:
        inputs: IR nodes: query, and key, value, planes, mask, sinks where the call has them.
        mask_strides: strides of the mask, 0 where it broadcasts.
        mask_floor: a floating mask at or below it prohibits.
        call: sizes and options.
    """

    def __init__(
        self, inputs: Mapping[str, ir.IRNode], mask_strides: Sequence[sympy.Expr], mask_floor: float, call: Constants
    ) -> None:
        query, cache = inputs["query"], [inputs[name] for name in ("key", "value") if name in inputs]
        self.inputs = {name.upper(): node for name, node in inputs.items()}
        batch, heads = call.sizes[0], V.graph.sizevars.guard_int(call.sizes[1])
        device = query.get_device()
        assert device is not None
        self.device = device
        self.arena = call.arena
        self.pairs = sympy.sympify(batch * heads)
        rows = call.group * call.query_rows
        self.padded = max(4, power_of_two(rows))
        short = call.length.is_Integer and call.length < call.min_context
        fits = self.padded <= LARGEST_GROUP and max(self.arena.key_dim, self.arena.value_dim) <= LARGEST_HEAD
        self.aligned = "PLANES" in self.inputs and call.aligned and fits and not short
        self.splits = splits(V.graph.sizevars.optimization_hint(self.pairs), processors(self.device))
        self.blocks = FloorDiv(call.length + (BLOCK_ROWS - 1), BLOCK_ROWS)
        self.share = FloorDiv(self.blocks + (self.splits - 1), self.splits)
        mask = inputs.get("mask")
        self.mask_kind = 0 if mask is None else 1 if mask.get_dtype() == torch.bool else 2
        element, full_row = call.dtype, (self.arena.key_dim + self.arena.value_dim) * call.dtype.itemsize
        residual = self.arena.storage.residual
        self.launches = read_launches(
            max(self.arena.key_dim, self.arena.value_dim), self.padded, element.itemsize, hip=is_hip(), decodes=residual
        )
        self.constants: dict[str, object] = {
            **head_constants(self.arena),
            **self.launches.tiles,
            **policy_constants(self.arena, element.itemsize),
            **option_constants(call.tolerance, call.unit_roundoff, max(call.min_context, 1)),
            "HEADS": heads,
            "GROUP": call.group,
            "QUERIES": call.query_rows,
            "M": rows,
            "MP": self.padded,
            "MW": max(16, self.padded),
            "NQ": max(16 if has_tensor_memory(device) else 0, 2 * self.padded),
            "SPLITS": self.splits,
            "SP": power_of_two(self.splits),
            "GRID_Y": self.splits,
            "BLOCK": BLOCK_ROWS,
            "SCAN": 1024,
            "COLUMNS": min(64, power_of_two(self.arena.value_dim)),
            "HAS_MASK": self.mask_kind,
            "MASK_SHARED": call.query_rows == 1 and mask is not None and mask_strides[1] == 0,
            "HAS_SINKS": "SINKS" in self.inputs,
            "SOFTCAP": max(call.softcap, 0.0),
            "HAS_STATE": self.aligned,
            "COUNTED": "PLANES" in self.inputs,
            "FLOOR": mask_floor,
            "SCALE": call.scale,
            "ABS_SCALE": abs(call.scale),
            "PRECISION": "'ieee'" if is_hip() else "'tf32x3'",
            "PACKED": has_ptx(device),
            "PLACES": call.dtype == torch.float16,
            "FULL_KEY": self.arena.key_dim * element.itemsize,
            "FULL_VALUE": self.arena.value_dim * element.itemsize,
            "READ_KEY": self.arena.key_dim * (element.itemsize - residual),
            "READ_VALUE": self.arena.value_dim * (element.itemsize - residual) + 2 * self.arena.value_plane_row * residual,
            "STREAMED_ROW": self.arena.stored_row if self.arena.storage.packed else full_row,
            "REFINEMENT": self.arena.key_plane_row * (2 if call.softcap > 0 else 1),
            "FIELDS": STATISTIC_FIELDS,
            "LIMIT_FIELDS": LIMIT_FIELDS,
            "COUNTERS": COUNTERS,
            "PROHIBITED": PROHIBITED,
        }
        self.sizes = [self.pairs, call.length, call.sizes[2], *mask_strides, *query.get_stride()]
        self.sizes += [stride for tensor in cache for stride in tensor.get_stride()[:3]] or [0] * 6
        if "SINKS" in self.inputs:
            self.sizes += self.inputs["SINKS"].get_stride()

    def emit(
        self,
        name: str,
        inputs: Mapping[str, ir.IRNode],
        mutated: Sequence[str],
        output: ir.Layout,
        **constants: object,
    ) -> ir.TensorBox:
        """One kernel."""
        values = {**self.constants, **constants}
        return emit(name, inputs, mutated, output, self.sizes, values, self.launches.of(name), self.arena.storage)

    def floats(self, *size: object) -> ir.FixedLayout:
        """A fresh float32 buffer ``[pairs, *size]``."""
        return contiguous(self.device, torch.float32, self.pairs, *size)

    def scratch(self, dtype: torch.dtype, *size: object) -> ir.IRNode:
        """Memory ``[pairs, *size]`` that kernels write beside their output."""
        return scratch(self.device, dtype, self.pairs, *size)

    def mask(self) -> dict[str, ir.IRNode]:
        """The mask, behind what is known of a floating one."""
        if not self.mask_kind:
            return {}
        lenient = {}
        if self.mask_kind == 2:
            output = contiguous(self.device, torch.float32, self.pairs, self.padded)
            lenient = {"LENIENT": self.emit("lenient", {"MASK": self.inputs["MASK"]}, [], output, GRID_Y=1)}
        return {**lenient, "MASK": self.inputs["MASK"]}

    def cache(self) -> dict[str, ir.IRNode]:
        """K and V, where the arena is not the cache."""
        return {name: self.inputs[name] for name in ("KEY", "VALUE") if name in self.inputs}

    def sinks(self) -> dict[str, ir.IRNode]:
        """The sinks where there are any."""
        return {"SINKS": self.inputs["SINKS"]} if "SINKS" in self.inputs else {}

    def read(self, output: ir.Layout) -> ir.TensorBox:
        """The whole call."""
        return self.read_aligned(output) if self.aligned else self.stream(output)

    def read_aligned(self, output: ir.Layout) -> ir.TensorBox:
        """Steps 1 to 5 of docs/policy.md."""
        padded, dim, splits = self.padded, self.arena.value_dim, self.splits
        query, planes = {"QUERY": self.inputs["QUERY"]}, {"PLANES": self.inputs["PLANES"]}
        mask = {**self.mask(), **self.sinks()}
        scores = {
            "SCORES": self.scratch(torch.int16, self.blocks, BLOCK_ROWS, padded),
            "SEEN": self.scratch(torch.uint8, self.blocks),
        }
        statistics = {"STATISTICS": self.scratch(torch.float32, splits, STATISTIC_FIELDS, padded)}
        sums = {
            "MASSES": self.scratch(torch.float32, splits, self.share, padded),
            **statistics,
            "COHERENT": self.scratch(torch.bfloat16, splits, padded, dim),
        }
        written = {**scores, **sums}
        limits = self.emit(
            "scan",
            {**query, **planes, **written, **self.raw(), **mask},
            ["PLANES", *written],
            self.floats(LIMIT_FIELDS, padded),
        )
        rows = self.share * BLOCK_ROWS
        counts = {"COUNTS": self.scratch(torch.int32, splits, COUNTERS)}
        lists = {
            "LIST": self.scratch(torch.int32, splits, rows),
            "WEIGHTS": self.scratch(torch.float32, splits, rows, padded),
            "CHOSEN": self.scratch(torch.int32, splits, 2, rows),
            "SKIPPED": self.scratch(torch.float32, splits, self.share, padded),
        }
        parts = {
            "PARTS": self.scratch(torch.float32, splits, padded, dim),
            "TOPS": self.scratch(torch.float32, splits, 2, padded),
            "VERDICTS": self.scratch(torch.int32, 1 + splits),
            **counts,
        }
        cache = self.cache()
        inputs = {**query, **planes, **cache, **scores, **statistics, "LIMITS": limits, **lists, **parts, **mask}
        result = self.emit("finish", inputs, ["PLANES", *lists, *parts], output)
        inputs = {**query, **planes, **cache, **parts, "OUT": result, **mask}
        self.emit("repair", inputs, ["PLANES", *parts, "OUT"], contiguous(self.device, torch.int32, 1))
        self.counted = counts
        return result

    def raw(self) -> dict[str, ir.IRNode]:
        """What there is of raw rows, where an arena may hold some."""
        if not self.arena.storage.residual:
            return {}
        written = {
            "RAW_ROWS": self.scratch(torch.int32, self.splits, self.share * BLOCK_ROWS),
            "RAW_NORMS": self.scratch(torch.float32, self.blocks, BLOCK_ROWS),
            "SPOILT": self.scratch(torch.int32, self.splits),
        }
        inputs = {"QUERY": self.inputs["QUERY"], "PLANES": self.inputs["PLANES"], **written}
        output = self.floats(self.blocks, BLOCK_ROWS, self.padded)
        scores = self.emit("raw", inputs, [*written], output, HAS_MASK=0, HAS_SINKS=False)
        return {"RAW_SCORES": scores, "RAW_NORMS": written["RAW_NORMS"], "SPOILT": written["SPOILT"]}

    def stream(self, output: ir.Layout) -> ir.TensorBox:
        """Every bit. Beside an arena, in which arrivals are counted, it is one launch."""
        splits, padded, dim = self.splits, self.padded, self.arena.value_dim
        self.counted = {"READ": self.scratch(torch.int32, splits)}
        tops = {"TOPS": self.scratch(torch.float32, splits, 2, padded)}
        inputs = {"QUERY": self.inputs["QUERY"], **self.cache(), **tops, **self.counted}
        if "PLANES" in self.inputs:
            shared = {"PLANES": self.inputs["PLANES"], "PARTS": self.scratch(torch.float32, splits, padded, dim)}
            inputs = {**inputs, **shared, **self.mask(), **self.sinks()}
            return self.emit("stream", inputs, ["TOPS", "READ", *shared], output)
        inputs |= {**self.mask(), **self.sinks()}
        parts = self.emit("stream", inputs, ["TOPS", "READ"], self.floats(splits, padded, dim))
        chunks = -(-dim // int(str(self.constants["COLUMNS"])))
        return self.emit("combine", {"PARTS": parts, **tops}, [], output, GRID_Y=chunks)

    def count(self, counters: ir.IRNode, site: int) -> None:
        """Add what was read to row ``site`` of ``counters``."""
        dummy = contiguous(self.device, torch.int32, 1)
        self.emit("count", {"COUNTERS_OUT": counters, **self.counted}, ["COUNTERS_OUT"], dummy, SITE=site, SCAN=128)
