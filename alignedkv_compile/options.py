"""What a user may ask of ``torch.compile(model, backend="alignedkv", mode=..., options={...})``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace

import torch

from . import break_even, torch_private
from .break_even import ReadShape
from .errors import OptionValueError, UnknownInductorOptionError, UnknownModeError, UnknownOptionError

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""Inductor's modes that keep custom lowerings in use: all but "lite", which sends every operator to its eager kernel."""

UNIT_ROUNDOFF: Mapping[torch.dtype, float] = {
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float32: 2.0**-24,
}
"""Largest relative error of rounding to nearest, by dtype; the keys are the dtypes that a cache may have."""

MEMORIES = ("beside", "planes")
"""Where planes may be: beside the cache of the model, or in the place of one only."""

GUARANTEES = ("expected", "worst_case")
"""What ``tolerance`` may be: a mean over many outputs, or a bound on every one."""


@dataclass(frozen=True)
class Options:
    """Options of the backend; :func:`parse` makes one from what ``torch.compile`` passes on.

    Attributes:
        tolerance: error that reading fewer bits may add to an attention output, in units of the rounding error that the
            output's dtype makes anyway; ``guarantee`` says which error. 0 reads every bit.
        guarantee: what ``tolerance`` promises. ``"expected"``: the rms error over many outputs, for independent rounding
            errors, is at most ``tolerance`` times the rms rounding error. ``"worst_case"``: the error of every single output
            row, whatever the cache holds, is at most ``tolerance * u * ||row||``, in units of the *largest* rounding error;
            the bound is computed from what was read, and :func:`alignedkv_compile.stats` shows it. Fewer bytes are saved.
        min_context: with fewer live cache rows than this, every bit is read, as it is faster. None is what pays: on a CPU what
            was measured there (see ``calibrate``), on a GPU more rows where pairs are few
            (:mod:`alignedkv_compile.break_even`). Where a cache never reaches it, no planes are kept.
        calibrate: where ``min_context`` is None, time both reads the first time that a CPU meets a kind of read (dtype, head
            dimension, query rows per KV head), which takes some seconds, and keep the result beside Inductor's caches; read
            every bit for queries of more than :data:`~alignedkv_compile.break_even.MOST_ALIGNED_QUERY_ROWS` tokens, and leave
            those of more than :data:`~alignedkv_compile.cost.options.MOST_QUERY_ROWS` to stock attention. False is 512 rows
            for every read, of up to 16 tokens.
        strict: raise :class:`~alignedkv_compile.errors.DeclinedError` when an attention site over a KV cache is declined, and
            let internal errors through. A long query that keeps stock attention by design is not declined.
        stats: count the bytes read, for :func:`alignedkv_compile.stats`.
        accuracy: the dtype in whose rounding error ``tolerance`` is measured; None is the cache's own. With ``float16``, an
            fp32 model gets attention as accurate as fp16 arithmetic would make it.
        assume_exclusive_cache: trust that nothing but compiled code writes a cache tensor made under
            ``torch.inference_mode()``. Such tensors count no versions, so a foreign write cannot be seen.
        memory: ``"beside"`` keeps planes next to the caches of transformers, which takes half as much memory again. With
            ``"planes"`` only an :class:`alignedkv_compile.Cache`, whose storage they are, is read from planes; every bit of
            other caches is read, and nothing is kept for it.
        shadow_every: one call in so many of each graph is also computed from all bits, and what the reads were off by goes to
            :func:`alignedkv_compile.on_shadow` and the metrics; 0 is never. Such a call takes longer, and waits for a GPU.
        share_layers: on CPUs, compile layers that compute the same once instead of once each: the first token comes sooner, and
            later ones take a few per cent longer. Has no effect with Inductor's ``freezing``.
        inductor: entries of ``torch._inductor.config`` to set while compiling; they override ``mode``.
        mode: one of :data:`MODES`, or None.
    """

    tolerance: float = 2.0
    guarantee: str = "expected"
    min_context: int | None = None
    calibrate: bool = True
    strict: bool = False
    stats: bool = False
    accuracy: torch.dtype | None = None
    assume_exclusive_cache: bool = False
    memory: str = "beside"
    shadow_every: int = 0
    share_layers: bool = True
    inductor: Mapping[str, object] = field(default_factory=dict, hash=False)
    mode: str | None = None

    def unit_roundoff(self, dtype: torch.dtype) -> float:
        """Unit roundoff of ``accuracy``, or of the cache's ``dtype`` when no accuracy was asked for.

        Raises:
            KeyError: ``dtype`` is none of bfloat16, float16, float32.
        """
        return UNIT_ROUNDOFF[self.accuracy or dtype]

    def least_context(self, read: ReadShape) -> int:
        """``min_context``, or what pays for this kind of read when none was asked for."""
        return break_even.least_context(read) if self.min_context is None else self.min_context

    def break_even(self, read: ReadShape) -> float:
        """The share of a head's bytes beyond which it should read every bit, 0 where nothing has been measured."""
        return 0.0

    def most_query_rows(self, read: ReadShape) -> int:
        """New tokens up to which a read of few bits is wanted, as far as kernels take them."""
        return break_even.NEVER

    @property
    def without_planes(self) -> Options:
        """The same for a cache that no planes are kept for."""
        return replace(self, tolerance=0.0)

    @property
    def certified(self) -> bool:
        """Whether every read must stay within a bound that holds for every input."""
        return self.guarantee == "worst_case"

    @property
    def cuda_graphs(self) -> bool:
        """Whether ``mode`` or ``inductor`` asks for CUDA graphs."""
        return torch_private.asks_for_cuda_graphs(self.inductor_patches())

    def inductor_patches(self) -> dict[str, object]:
        """Entries of Inductor's config to set while compiling: those of ``mode``, then those of ``inductor``."""
        return {**torch_private.mode_patches(self.mode), **self.inductor}


def parse(mode: str | None = None, options: Mapping[str, object] | None = None) -> Options:
    """Check ``mode`` and ``options`` as they arrive from ``torch.compile``.

    Raises:
        UnknownModeError: ``mode`` is not in :data:`MODES`.
        UnknownOptionError: a name is not one of the options of :class:`Options`.
        OptionValueError: a value has the wrong type or range.
        UnknownInductorOptionError: ``inductor`` names an entry that Inductor's config lacks.
    """
    if mode is not None and mode not in MODES:
        raise UnknownModeError(mode, MODES)
    if options is not None and not isinstance(options, Mapping):
        raise OptionValueError("options", options, "a dict of option names to values")
    values = {}
    for name, value in (options or {}).items():
        if name not in _PARSERS:
            raise UnknownOptionError(str(name), value, OPTION_NAMES)
        values[name] = _PARSERS[name](name, value)
    return Options(mode=mode, **values)  # type: ignore[arg-type]


def _tolerance(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 <= value < math.inf):
        raise OptionValueError(name, value, "a finite number >= 0 (0 reads all bits)")
    return float(value)


def _row_count(name: str, value: object) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise OptionValueError(name, value, "an int >= 0, or None for what pays on the device")
    return value


def _call_count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise OptionValueError(name, value, "an int >= 0: one call in so many is checked, 0 for none")
    return value


def _guarantee(name: str, value: object) -> str:
    if value not in GUARANTEES:
        raise OptionValueError(name, value, " or ".join(map(repr, GUARANTEES)))
    return str(value)


def _memory(name: str, value: object) -> str:
    if value not in MEMORIES:
        raise OptionValueError(name, value, " or ".join(map(repr, MEMORIES)))
    return str(value)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise OptionValueError(name, value, "True or False")
    return value


def _accuracy(name: str, value: object) -> torch.dtype | None:
    by_name = {str(dtype).removeprefix("torch."): dtype for dtype in UNIT_ROUNDOFF}
    dtype = by_name.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if value is not None and dtype not in UNIT_ROUNDOFF:
        raise OptionValueError(name, value, f"None, a torch.dtype or the name of one: {', '.join(by_name)}")
    return dtype  # type: ignore[return-value]


def _inductor(name: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise OptionValueError(name, value, "a dict of entries of torch._inductor.config, e.g. {'freezing': True}")
    known = torch_private.inductor_config_types()
    for key, entry in value.items():
        attribute = str(key).replace("-", "_")
        if attribute not in known:
            raise UnknownInductorOptionError(key, entry, known)
        expected = known[attribute]
        if isinstance(expected, type) and not isinstance(entry, expected):
            raise OptionValueError(f"inductor[{key!r}]", entry, f"a value of type {expected.__name__}")
    return {str(key).replace("-", "_"): entry for key, entry in value.items()}


_PARSERS: Mapping[str, Callable[[str, object], object]] = {
    "tolerance": _tolerance,
    "guarantee": _guarantee,
    "memory": _memory,
    "min_context": _row_count,
    "calibrate": _flag,
    "strict": _flag,
    "stats": _flag,
    "accuracy": _accuracy,
    "assume_exclusive_cache": _flag,
    "shadow_every": _call_count,
    "share_layers": _flag,
    "inductor": _inductor,
}

OPTION_NAMES = tuple(entry.name for entry in fields(Options) if entry.name in _PARSERS)
