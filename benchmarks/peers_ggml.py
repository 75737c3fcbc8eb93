"""ggml's flash attention on CPUs, what llama.cpp runs with ``--flash-attn``, called through its C interface.

The prebuilt library of the package libggml-python uses AVX2 at most; ``folder`` names one built for the machine instead
(``cmake -B build -DBUILD_SHARED_LIBS=ON`` in ggml or llama.cpp builds with what the machine has). Rows lie as llama.cpp's cache
has them, all heads of a token next to each other; *by head* is the layout of every other peer, all tokens of a head.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from attention_inputs import Shape
from attention_variants import Prepared
from peers_base import Copy, Opening, Peer, PeerRefusalError, require

PACKAGE = "libggml-python"
_F32, _PRECISION_F32 = 0, 10
"""``GGML_TYPE_F32`` and ``GGML_PREC_F32``, the precision of the accumulation that llama.cpp asks for."""
_FEATURES = ("avx2", "fma", "f16c", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx_int8", "neon", "sve")
_NODES = 16
"""Tensors of one context, generously: query, K, V, their views and the output."""
_ALIGNMENT = 64


@dataclass(frozen=True)
class CacheType:
    """A type of llama.cpp's ``--cache-type-k`` and ``-v``.

    Attributes:
        label: in the row's name.
        number: of ``enum ggml_type``.
        by_head: whether a head's tokens are adjacent, rather than a token's heads.
    """

    label: str
    number: int
    by_head: bool = False


CACHE_TYPES = (
    CacheType("f16", 1),
    CacheType("f16 by head", 1, by_head=True),
    CacheType("bf16", 30),
    CacheType("q8_0", 8),
    CacheType("q8_0 by head", 8, by_head=True),
    CacheType("q4_0", 2),
)


class _InitParams(ctypes.Structure):
    """``struct ggml_init_params``."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _ThreadPoolParams(ctypes.Structure):
    """``struct ggml_threadpool_params``; 512 is ``GGML_MAX_N_THREADS``."""

    _fields_ = (
        ("cpumask", ctypes.c_bool * 512),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    )


class Library:
    """The functions that are called, and a CPU backend with threads that stay, as llama.cpp's do."""

    def __init__(self, folder: Path, threads: int) -> None:
        """Load ``libggml-base.so`` and ``libggml-cpu.so``.

        Raises:
            PeerRefusalError: they are not in ``folder``, cannot be loaded, or are of a release without what is called.
        """
        try:
            self._base = ctypes.CDLL(str(folder / "libggml-base.so"))
            self._cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
            self._declare()
        except (OSError, AttributeError) as error:
            raise PeerRefusalError(f"no usable ggml in {folder}: {error}") from None
        self.backend = self.backend_cpu_init()
        self.backend_cpu_set_n_threads(self.backend, threads)
        self.pool = self.threadpool_new(ctypes.byref(self.threadpool_params_default(threads)))
        self.backend_cpu_set_threadpool(self.backend, self.pool)

    def _declare(self) -> None:
        pointer, integer, size, real, long = (
            ctypes.c_void_p,
            ctypes.c_int,
            ctypes.c_size_t,
            ctypes.c_float,
            ctypes.c_int64,
        )
        base, cpu = functools.partial(_function, self._base), functools.partial(_function, self._cpu)
        self.version = base("version", ctypes.c_char_p, [])
        self.init = base("init", pointer, [_InitParams])
        self.free = base("free", None, [pointer])
        self.tensor_overhead = base("tensor_overhead", size, [])
        self.graph_overhead = base("graph_overhead", size, [])
        self.row_size = base("row_size", size, [integer, long])
        self.new_tensor = base("new_tensor_4d", pointer, [pointer, integer, long, long, long, long])
        self.permute = base("permute", pointer, [pointer, pointer, integer, integer, integer, integer])
        self.get_data = base("get_data", pointer, [pointer])
        self.quantize_chunk = base("quantize_chunk", size, [integer, pointer, pointer, long, long, long, pointer])
        self.flash_attn_ext = base("flash_attn_ext", pointer, [pointer, pointer, pointer, pointer, pointer, real, real, real])
        self.flash_attn_ext_set_prec = base("flash_attn_ext_set_prec", None, [pointer, integer])
        self.new_graph = base("new_graph", pointer, [pointer])
        self.build_forward_expand = base("build_forward_expand", None, [pointer, pointer])
        self.graph_compute = base("backend_graph_compute", integer, [pointer, pointer])
        self.threadpool_params_default = base("threadpool_params_default", _ThreadPoolParams, [integer])
        self.threadpool_new = cpu("threadpool_new", pointer, [pointer])
        self.threadpool_pause = cpu("threadpool_pause", None, [pointer])
        self.backend_cpu_init = cpu("backend_cpu_init", pointer, [])
        self.backend_cpu_set_n_threads = cpu("backend_cpu_set_n_threads", None, [pointer, integer])
        self.backend_cpu_set_threadpool = cpu("backend_cpu_set_threadpool", None, [pointer, pointer])

    def features(self) -> str:
        """Release and the instruction sets that it was compiled for."""
        found = [name for name in _FEATURES if _function(self._cpu, f"cpu_has_{name}", ctypes.c_int, [])()]
        return f"{self.version().decode()} ({' '.join(found)})"


def _function(library: ctypes.CDLL, name: str, result: Any, arguments: Sequence[Any]) -> Any:
    found = getattr(library, f"ggml_{name}")
    found.restype, found.argtypes = result, arguments
    return found


def ggml_peers(threads: int, folder: Path | None) -> list[Peer]:
    """A peer for each type and layout of the cache.

    Args:
        threads: of every call.
        folder: with ``libggml-base.so`` and ``libggml-cpu.so``; None is the package's own.
    """
    built = str(folder) if folder is not None else f"the package {PACKAGE}"
    return [
        Peer(
            f"ggml {cache.label}",
            f"ggml_flash_attn_ext on CPUs, of {built}; {cache.label} cache, fp32 query",
            functools.partial(_open, cache, threads, folder),
            PACKAGE if folder is None else "",
        )
        for cache in CACHE_TYPES
    ]


@functools.cache
def load(threads: int, folder: Path | None) -> Library:
    """The library, once for a run.

    Raises:
        PeerRefusalError: it is not installed, or does not load.
    """
    if folder is None:
        require("libggml", PACKAGE)
        folder = Path(str(resources.files("libggml"))) / "lib64"
    return Library(folder, threads)


def _open(cache: CacheType, threads: int, folder: Path | None, shape: Shape, dtype: torch.dtype) -> Opening:
    return functools.partial(_copy, load(threads, folder), cache)


def _copy(library: Library, cache: CacheType, prepared: Prepared) -> Copy:
    layer = prepared.layer
    shape, context, dim = layer.shape, layer.context, layer.shape.head_dim
    query = layer.query.float().contiguous()
    nbytes = 2 * shape.heads * context * library.row_size(cache.number, dim)
    room = _NODES * (library.tensor_overhead() + _ALIGNMENT) + library.graph_overhead() + nbytes + 2 * query.nbytes
    arena = library.init(_InitParams(room, None, False))
    rows = library.new_tensor(arena, _F32, dim, 1, shape.query_heads, 1)
    ctypes.memmove(library.get_data(rows), query.data_ptr(), query.nbytes)
    key, value = (_store(library, arena, cache, tensor) for tensor in (layer.key, layer.value))
    output = library.flash_attn_ext(arena, rows, key, value, None, layer.scale, 0.0, 0.0)
    library.flash_attn_ext_set_prec(output, _PRECISION_F32)
    graph = library.new_graph(arena)
    library.build_forward_expand(graph, output)
    run = functools.partial(library.graph_compute, library.backend, graph)

    def read() -> torch.Tensor:
        status = run()
        if status:
            raise PeerRefusalError(f"ggml_backend_graph_compute returned {status}")
        found = torch.empty(layer.query.shape, dtype=torch.float32)
        ctypes.memmove(found.data_ptr(), library.get_data(output), found.nbytes)
        return found

    # The next call wakes a pool that is paused.
    copy = Copy(run, read, nbytes, functools.partial(library.threadpool_pause, library.pool))
    weakref.finalize(copy, library.free, arena)
    return copy


def _store(library: Library, arena: int, cache: CacheType, tensor: torch.Tensor) -> int:
    """K or V, ``[1, H, C, D]``, as a tensor of ggml's shape ``[D, C, H, 1]`` (its dimensions run from the innermost)."""
    _, heads, context, dim = tensor.shape
    rows = (tensor if cache.by_head else tensor.transpose(1, 2)).float().contiguous()
    found: int = library.new_tensor(arena, cache.number, dim, *((context, heads) if cache.by_head else (heads, context)), 1)
    library.quantize_chunk(cache.number, rows.data_ptr(), library.get_data(found), 0, heads * context, dim, None)
    if not cache.by_head:
        found = library.permute(arena, found, 0, 2, 1, 3)
    return found
