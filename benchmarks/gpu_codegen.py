"""Generate the operators' Triton for GPUs that are not there, compile every kernel for five targets, and report what came out.

Inductor generates the source from fake CUDA tensors under a stand-in for ``torch.cuda``; Triton's own compiler and the
``ptxas``, ``cuobjdump`` and LLVM that ship with it make machine code. Nothing is executed, and no GPU has run or timed any
of it.

    python benchmarks/gpu_codegen.py                         # five targets, head dimensions 64, 128 and 256
    python benchmarks/gpu_codegen.py --targets sm_90 --dims 128 --dtype float16 --json results/codegen.json
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import rich
import rich.table
import torch
import typer

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # triton's own default, without its warning

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from alignedkv_compile import lowering
from alignedkv_compile.layout import ArenaLayout, arena_layout
from alignedkv_compile.options import UNIT_ROUNDOFF
from alignedkv_compile.storage import STORAGES


@dataclass(frozen=True)
class Device:
    """What Inductor asks about a GPU, from the vendors' data sheets."""

    name: str
    capability: tuple[int, int]
    processors: int
    target: GPUTarget
    shared_memory: int


DEVICES = {
    "sm_80": Device("A100", (8, 0), 108, GPUTarget("cuda", 80, 32), 166912),
    "sm_90": Device("H100", (9, 0), 132, GPUTarget("cuda", 90, 32), 232448),
    "sm_100": Device("B200", (10, 0), 148, GPUTarget("cuda", 100, 32), 232448),
    "sm_120": Device("RTX 5090", (12, 0), 170, GPUTarget("cuda", 120, 32), 101376),
    "gfx942": Device("MI300X", (9, 4), 304, GPUTarget("hip", "gfx942", 64), 65536),
}


class NoDriver(DriverBase):
    """A driver that knows its target and launches nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_benchmarker(self) -> Callable[..., list[float]]:
        return lambda function, **_: [1.0, 1.0, 1.0]

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: object) -> int:
        return 0


def stand_in_for_cuda(device: Device) -> None:
    """Make Inductor generate for ``device``. For a process that does nothing else: nothing is undone."""
    from torch._dynamo import device_interface
    from torch._inductor import config
    from torch._inductor.fx_passes import joint_graph
    from torch._inductor.runtime import triton_helpers
    from torch.utils import _triton

    triton.runtime.driver.set_active(NoDriver(device.target))
    major, minor = device.capability
    properties = SimpleNamespace(
        name=device.name,
        major=major,
        minor=minor,
        multi_processor_count=device.processors,
        warp_size=device.target.warp_size,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        total_memory=80 << 30,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=device.shared_memory,
        L2_cache_size=50 << 20,
        gcnArchName=str(device.target.arch),
        uuid="0",
    )
    torch._C._ensureCUDADeviceGuardSet()  # a guard that does nothing; must come before the rest
    cuda: Any = torch.cuda  # is_available() stays False: Inductor would otherwise trace patterns on real CUDA tensors
    cuda.get_device_properties = lambda device=None: properties
    cuda.get_device_capability = lambda device=None: (major, minor)
    cuda.current_device = lambda: 0
    cuda.device_count = lambda: 1
    cuda.is_bf16_supported = lambda *_, **__: True
    cuda.is_tf32_supported = lambda *_: True
    cuda.synchronize = lambda *_: None
    cuda._lazy_init = lambda: None
    cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    cuda.set_rng_state = lambda *_: None
    cuda.is_initialized = lambda: False

    class Interface(device_interface.CudaInterface):
        class Worker:
            set_device = staticmethod(lambda device: None)
            current_device = staticmethod(lambda: 0)
            get_device_properties = staticmethod(lambda device=None: properties)

        current_device = staticmethod(lambda: 0)
        device_count = staticmethod(lambda: 1)
        get_device_properties = staticmethod(lambda device=None: properties)  # type: ignore[assignment]
        is_available = staticmethod(lambda: True)
        get_compute_capability = staticmethod(lambda device=None: major * 10 + minor)
        is_bf16_supported = staticmethod(lambda *_, **__: True)
        is_triton_capable = staticmethod(lambda device=None: True)
        raise_if_triton_unavailable = classmethod(lambda cls, device=None: None)
        get_raw_stream = staticmethod(lambda device: 0)
        synchronize = staticmethod(lambda device=None: None)

    device_interface.init_device_reg()  # a later first look-up would put the real one over ours
    _triton.has_triton.cache_clear()
    for name in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(name, Interface)
    copy = torch.Tensor.copy_
    torch.Tensor.copy_ = lambda self, source, non_blocking=False: (  # type: ignore[method-assign, assignment]
        torch.ops.aten.copy_.default(self, source, non_blocking)  # the method wants a real device guard, the operator does not
        if self.device.type == "cuda"
        else copy(self, source, non_blocking)
    )
    initialize = joint_graph.lazy_init
    joint_graph.lazy_init = lambda device=None: initialize(torch.device("cpu"))
    triton_helpers.set_driver_to_gpu = lambda: None
    config.compile_threads = 1
    config.fx_graph_cache = False
    config.triton.cudagraphs = False
    config.triton.autotune_at_compile_time = False
    torch._functorch.config.enable_autograd_cache = False
    if device.target.backend == "hip":
        torch.version.hip = "stand-in"


def on_gpu(dtype: torch.dtype, *size: int) -> torch.Tensor:
    """A tensor of the GPU that is not there."""
    return torch.empty(*size, dtype=dtype, device="cuda:0")


@dataclass(frozen=True)
class Call:
    """A decode step: shapes of the query and the cache, and the cache's dtype."""

    dim: int
    query_heads: int = 32
    heads: int = 8
    context: int = 131072
    queries: int = 1
    dtype: torch.dtype = torch.bfloat16
    masked: bool = True
    tolerance: float = 2.0

    def tensors(self) -> list[torch.Tensor]:
        """Fake CUDA tensors: planes, new K, new V, positions, query, K, V, mask."""
        empty = functools.partial(on_gpu, self.dtype)
        key, value = (empty(1, self.heads, self.context, self.dim) for _ in range(2))
        return [
            on_gpu(torch.uint8, arena_layout(key, value).total),
            *(empty(1, self.heads, 1, self.dim) for _ in range(2)),
            on_gpu(torch.int64, 1),
            empty(1, self.query_heads, self.queries, self.dim),
            key,
            value,
            *([on_gpu(torch.bool, 1, 1, self.queries, self.context)] if self.masked else []),
        ]

    def function(self) -> Callable[..., tuple[torch.Tensor, ...]]:
        """One layer's write and read."""
        operators = torch.ops.alignedkv
        context, scale, roundoff, masked = self.context, self.dim**-0.5, UNIT_ROUNDOFF[self.dtype], self.masked
        tolerance = self.tolerance

        def step(planes, new_key, new_value, positions, query, key, value, *mask):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN002, ANN202
            key.index_copy_(2, positions, new_key)
            value.index_copy_(2, positions, new_value)
            operators.quantize_on_write.default(planes, new_key, new_value, positions, context)
            options = (mask[0] if masked else None, None, context, scale, 0.0, tolerance, roundoff, 512)
            return (operators.aligned_read_attention.default(query, key, value, planes, *options),)

        if masked:
            return lambda a, b, c, d, e, f, g, h: step(a, b, c, d, e, f, g, h)
        return lambda a, b, c, d, e, f, g: step(a, b, c, d, e, f, g)


@dataclass(frozen=True)
class PackedCall(Call):
    """The same over an ``alignedkv_compile.Cache``, without a mask."""

    storage: str = "8bit"

    def tensors(self) -> list[torch.Tensor]:
        """Fake CUDA tensors: planes, new K, new V, positions, query."""
        empty = functools.partial(on_gpu, self.dtype)
        layout = ArenaLayout(self.heads, self.context, self.dim, self.dim, STORAGES[self.storage], self.dtype.itemsize)
        row, query = (1, self.heads, 1, self.dim), (1, self.query_heads, self.queries, self.dim)
        return [on_gpu(torch.uint8, layout.total), empty(*row), empty(*row), on_gpu(torch.int64, 1), empty(*query)]

    def function(self) -> Callable[..., tuple[torch.Tensor, ...]]:
        """One layer's write and read."""
        operators, storage, context = torch.ops.alignedkv, self.storage, self.context
        cache = (self.heads, self.dim, self.dtype, storage, context, context)
        numbers = (self.dim**-0.5, 0.0, self.tolerance, UNIT_ROUNDOFF[self.dtype], 512)

        def step(planes, new_key, new_value, positions, query):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
            operators.store_rows.default(planes, new_key, new_value, positions, context, storage)
            return (operators.packed_read_attention.default(query, planes, None, None, *cache, *numbers),)

        return step


class _CapturedError(Exception):
    """Ends a compilation once the source is there: loading it would need a GPU."""


def generate(call: Call) -> str:
    """The module that Inductor writes for ``call``."""
    from unittest.mock import patch

    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    lowering.register()
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with mode:
        inputs = call.tensors()
    module = torch.fx.symbolic_trace(call.function())
    sources: list[str] = []

    def capture(self: GraphLowering) -> None:
        code, _ = self.codegen()
        sources.append(code.value)
        raise _CapturedError

    with patch.object(GraphLowering, "_compile_to_module", capture), torch.no_grad(), tracing(TracingContext(mode)):
        try:
            compile_fx(module, inputs)
        except Exception:
            if not sources:
                raise
    return sources[0]


def kernels(source: str) -> Iterator[tuple[str, str]]:
    """Name and source of each Triton kernel in a generated module."""
    yield from re.findall(
        r"^(\w+) = async_compile\.triton\('\w+', '''\n(.*?)''', device_str='cuda'\)", source, re.DOTALL | re.MULTILINE
    )


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one kernel."""

    target: str
    dim: int
    kernel: str
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    loop_instructions: int
    """Machine instructions in the longest innermost loop, each executed by every warp; 0 where they were not disassembled."""
    loads: dict[str, int]
    tensor_core: list[str]


def compile_kernel(name: str, source: str, target: str, dim: int) -> Compiled:
    """Machine code for one kernel, and its figures."""
    from torch._inductor.codecache import PyCodeCache

    device = DEVICES[target]
    known = inspect.signature(PyCodeCache.load).parameters
    options: dict[str, Any] = {"set_sys_modules": False} if "set_sys_modules" in known else {}  # torch 2.11 has no choice
    tuner = getattr(PyCodeCache.load(source, **options), name)
    config = tuner.configs[0]
    meta = tuner._create_compile_meta(config)
    settings: dict[str, object] = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    attributes = meta["configs"][0] if isinstance(meta["configs"], list) else meta["configs"]
    made = triton.compile(
        triton.compiler.ASTSource(tuner.fn, meta["signature"], meta["constants"], attributes),
        target=device.target,
        options=settings,
    )
    short = re.sub(r"^triton_\w*?fused_|_\d+$", "", name) if "_tem_" not in name else _template_name(source)
    figures = _nvidia_figures(made.asm) if device.target.backend == "cuda" else _amd_figures(made.asm["amdgcn"])
    return Compiled(target, dim, short, made.metadata.num_warps, shared_bytes=made.metadata.shared, **figures)


def _template_name(source: str) -> str:
    """Which of our templates a kernel was made from: each states its name first."""
    found = re.search(r"KERNEL_NAME : tl\.constexpr = '(\w+)'", source)
    return found.group(1) if found else "?"


def _nvidia_figures(asm: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage, code = (
            subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    loads: dict[str, int] = {}
    for vector, bits in re.findall(r"ld\.global(?:\.\w+|::\w+)*?(?:\.(v\d))?\.b(\d+)", asm["ptx"]):
        width = f"{int(vector[1:] if vector else 1) * int(bits) // 8}"
        loads[width] = loads.get(width, 0) + 1
    return {
        "registers": numbers["REG"],
        "spilled_bytes": numbers["STACK"] + numbers["LOCAL"],
        "loop_instructions": _longest_loop(code),
        "loads": loads,
        "tensor_core": sorted(set(re.findall(r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*", asm["ptx"]))),
    }


def _longest_loop(code: str) -> int:
    """Instructions between a branch back and its target, for the longest such loop that holds no other."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", code)
    addresses = [int(address, 16) for address, _, _ in lines]
    loops = []
    for address, (_, name, operands) in zip(addresses, lines, strict=True):
        target = re.search(r"0x([0-9a-f]+)\s*$", operands)
        if name.startswith("BRA") and target is not None and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    inner = [one for one in loops if not any(one[0] <= other[0] and other[1] <= one[1] and other != one for other in loops)]
    return max((sum(low <= address <= high for address in addresses) for low, high in inner), default=0)


def _amd_figures(assembly: str) -> dict[str, Any]:
    numbers = {
        name: int(value)
        for name, value in re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", assembly)
    }
    widths = {"ubyte": 1, "ushort": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "short": 2, "byte": 1}
    loads: dict[str, int] = {}
    for kind in re.findall(r"(?:global|buffer)_load_(ubyte|ushort|dwordx4|dwordx3|dwordx2|dword|short|byte)", assembly):
        width = str(widths[kind])
        loads[width] = loads.get(width, 0) + 1
    return {
        "registers": numbers["vgpr_count"],
        # a scalar register spills into a lane of a vector register, not into memory
        "spilled_bytes": 4 * numbers["vgpr_spill_count"] + numbers["private_segment_fixed_size"],
        "loop_instructions": 0,
        "loads": loads,
        "tensor_core": sorted(set(re.findall(r"v_mfma\w+", assembly))),
    }


def compile_target(target: str, dims: Sequence[int], dtype: torch.dtype, queries: int = 1) -> list[Compiled]:
    """All kernels for one target; in this process, which is spoilt for anything else afterwards."""
    stand_in_for_cuda(DEVICES[target])
    compiled = []
    for dim in dims:
        calls: dict[str, tuple[Call, set[str]]] = {
            "": (Call(dim, queries=queries, dtype=dtype, masked=False), {"quantize_on_write", "scan", "finish", "repair"}),
            " masked": (Call(dim, queries=queries, dtype=dtype), {"scan", "finish", "repair"}),
            " at tolerance 0": (Call(dim, queries=queries, dtype=dtype, masked=False, tolerance=0.0), {"stream", "combine"}),
            " 8bit": (PackedCall(dim, queries=queries, dtype=dtype), {"scan", "finish", "repair"}),
            " 4bit+": (
                PackedCall(dim, queries=queries, dtype=dtype, storage="4bit+"),
                {"quantize_on_write", "finish", "repair"},
            ),
        }
        if STORAGES["lossless"].has_triton(dtype, torch.device("cuda")):
            lossless = PackedCall(dim, queries=queries, dtype=dtype, storage="lossless")
            calls[" lossless"] = (lossless, {"quantize_on_write", "raw", "scan", "finish", "repair"})
        for suffix, (call, wanted) in calls.items():
            found = [(name, source) for name, source in kernels(generate(call)) if _template_name(source) in wanted]
            made = [compile_kernel(name, source, target, dim) for name, source in found]
            compiled += [replace(one, kernel=one.kernel + suffix) for one in made]
    return compiled


def main(
    targets: Annotated[str, typer.Option(help="comma-separated, of " + ", ".join(DEVICES))] = ",".join(DEVICES),
    dims: Annotated[str, typer.Option(help="comma-separated head dimensions")] = "64,128,256",
    dtype: Annotated[str, typer.Option(help="of query, K and V")] = "bfloat16",
    queries: Annotated[int, typer.Option(min=1, help="query rows of a head; a KV head has four heads")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the figures here too")] = None,
) -> None:
    """Compile every generated kernel for GPUs that are not there."""
    names = targets.split(",")
    if len(names) == 1:
        figures = compile_target(names[0], [int(dim) for dim in dims.split(",")], getattr(torch, dtype), queries)
    else:
        figures = []
        for target in names:
            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                options = [
                    "--targets",
                    target,
                    "--dims",
                    dims,
                    "--dtype",
                    dtype,
                    "--queries",
                    str(queries),
                    "--json",
                    file.name,
                ]
                command = [os.sys.executable, __file__, *options]  # type: ignore[attr-defined]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                figures += [Compiled(**entry) for entry in json.loads(Path(file.name).read_text())]
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps([asdict(entry) for entry in figures], indent=1))
    table = rich.table.Table(
        "target", "D", "kernel", "warps", "registers", "spilled", "shared", "loop", "loads: bytes x number", "tensor cores"
    )
    for entry in figures:
        loads = ", ".join(f"{width} x {count}" for width, count in sorted(entry.loads.items(), key=lambda pair: -int(pair[0])))
        numbers = (entry.warps, entry.registers, entry.spilled_bytes, entry.shared_bytes, entry.loop_instructions)
        tensor_cores = ", ".join(entry.tensor_core)
        table.add_row(entry.target, str(entry.dim), entry.kernel, *map(str, numbers), loads, tensor_cores)
    rich.get_console().print(table)


if __name__ == "__main__":
    typer.run(main)
