"""Other ways of reading a KV cache in fewer bytes, for ``alignedkv eval --compare benchmarks/kv_cache_methods.py``.

Each is eager torch written from its source, computes in float32 on the numbers that it has read, and counts the bytes of codes,
scales and zero points. Formats with a fixed rate read the same bytes at every step; the AlignedKV paper's rule decides per
query.

=====================  ==================================================================================================
method                 source
=====================  ==================================================================================================
fp8 e4m3, fp8 e5m2     OCP 8-bit Floating Point Specification (OFP8), revision 1.0, 2023; as vLLM's ``kv_cache_dtype="fp8"`` and
                       ``"fp8_e5m2"`` with scale 1: a saturating cast
int8 rows              symmetric 8-bit integers, one float16 scale per token and head: the per-token KV cache of SmoothQuant
                       (Xiao et al., arXiv 2211.10438)
KIVI 4-bit             Liu et al., arXiv 2402.02750: asymmetric 4-bit, K in groups of 32 tokens per channel, V in groups of 32
                       channels per token, float16 scale and zero, the newest 128 to 159 tokens in full precision
AlignedKV rule         Tan et al., arXiv 2409.16546: fp16 in planes of 8, 4 and 4 bits; K by the exponent of a channel, V by the
                       exponent of a token's weight; 4 and 8 bits are dropped 4 and 8 exponents below what the sum needs
AlignedKV code         the same with the steps for V of the published kernel (github.com/AlignedQuant/AlignedKV, V_cache.cu at
                       9a2a1e9), which compares with 0x400 and 0x800, 1 and 2 exponents, where K's kernel uses 4 and 8
=====================  ==================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from alignedkv_compile.evaluate.methods import Method, PreparedLayer, Step

INT8_MAX = 127.0
FP16_EXPONENT_BIAS = 15


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention in float32: ``query [1, Hq, 1, Dk]``, ``key [1, H, T, Dk]``, ``value [1, H, T, Dv]`` to ``[1, Hq, 1, Dv]``."""
    return weigh(softmax_rows(query, key, scale), value)


def softmax_rows(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Weights ``[1, H, Hq / H, T]``."""
    rows = query.float().reshape(1, key.shape[1], -1, query.shape[-1])
    return (rows @ key.mT * scale).softmax(-1)


def weigh(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``[1, H, Hq / H, T]`` weights times ``value [1, H, T, Dv]``, as ``[1, Hq, 1, Dv]``."""
    output = weights @ value
    return output.reshape(1, output.shape[1] * output.shape[2], 1, output.shape[3])


@dataclass(frozen=True)
class RowFormat:
    """Every row is rounded by itself, so a prefix of the cache is a prefix of the rounded cache."""

    name: str
    round_rows: Callable[[torch.Tensor], torch.Tensor]
    bytes_per_row: Callable[[int], float]

    def prepare(self, key: torch.Tensor, value: torch.Tensor) -> PreparedLayer:
        row = self.bytes_per_row(key.shape[3]) + self.bytes_per_row(value.shape[3])
        return _RoundedLayer(self.round_rows(key.float()), self.round_rows(value.float()), key.shape[1] * row)


@dataclass(frozen=True)
class _RoundedLayer:
    key: torch.Tensor
    value: torch.Tensor
    bytes_per_token: float

    def attend(self, query: torch.Tensor, length: int, scale: float) -> Step:
        return Step(attend(query, self.key[:, :, :length], self.value[:, :, :length], scale), length * self.bytes_per_token)


def fp8(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """Saturating cast to an 8-bit float and back."""
    top = torch.finfo(dtype).max
    return lambda rows: rows.clamp(-top, top).to(dtype).float()


def int8_rows(rows: torch.Tensor) -> torch.Tensor:
    """Symmetric int8 with one float16 scale per row."""
    scale = (rows.abs().amax(-1, keepdim=True) / INT8_MAX).half().float()
    return torch.where(scale > 0, (rows / scale).round().clamp(-INT8_MAX, INT8_MAX) * scale, 0.0)


@dataclass(frozen=True)
class Kivi:
    """KIVI at ``bits`` bits. A group of K is quantized when it is complete and has left the window of the newest ``window``
    tokens; V of the window stays in full precision too."""

    bits: int = 4
    group: int = 32
    window: int = 128

    @property
    def name(self) -> str:
        return f"KIVI {self.bits}-bit"

    def prepare(self, key: torch.Tensor, value: torch.Tensor) -> PreparedLayer:
        whole = key.shape[2] // self.group * self.group
        columns = self._quantize(key[:, :, :whole].float().unflatten(2, (-1, self.group)), 3).flatten(2, 3)
        width = -value.shape[3] % self.group
        padded = torch.cat([value, value[..., -1:].expand(-1, -1, -1, width)], 3).float()
        rows = self._quantize(padded.unflatten(3, (-1, self.group)), 4).flatten(3, 4)[..., : value.shape[3]]
        return _KiviLayer(self, key.float(), value.float(), columns, rows, key.element_size())

    def _quantize(self, numbers: torch.Tensor, dim: int) -> torch.Tensor:
        """Asymmetric integers along ``dim``: minimum and step in float16."""
        low = numbers.amin(dim, keepdim=True).half().float()
        step = ((numbers.amax(dim, keepdim=True) - low) / (2**self.bits - 1)).half().float()
        code = torch.where(step > 0, (numbers - low) / step, 0.0).round().clamp(0, 2**self.bits - 1)
        return code * step + low

    def bytes_per_token(self, key_dim: int, value_dim: int) -> float:
        """Codes, and a float16 scale and zero per group."""
        codes = (key_dim + value_dim) * self.bits / 8
        return codes + 4 * key_dim / self.group + 4 * -(-value_dim // self.group)


@dataclass(frozen=True)
class _KiviLayer:
    method: Kivi
    key: torch.Tensor
    value: torch.Tensor
    quantized_key: torch.Tensor
    quantized_value: torch.Tensor
    element_size: int

    def attend(self, query: torch.Tensor, length: int, scale: float) -> Step:
        method = self.method
        old = max(length - method.window, 0) // method.group * method.group
        key = torch.cat([self.quantized_key[:, :, :old], self.key[:, :, old:length]], 2)
        value = torch.cat([self.quantized_value[:, :, :old], self.value[:, :, old:length]], 2)
        heads, key_dim, value_dim = key.shape[1], key.shape[3], value.shape[3]
        recent = (length - old) * (key_dim + value_dim) * self.element_size
        return Step(attend(query, key, value, scale), heads * (old * method.bytes_per_token(key_dim, value_dim) + recent))


@dataclass(frozen=True)
class AlignedKVRule:
    """The paper's rule.

    The last ``length mod 64`` tokens are read whole. A K channel whose exponent (query's plus the channel's largest) is 4 or 8
    below the highest is read at 12 or 8 bits. A V token whose weight's exponent is ``value_steps`` below the one that the
    output needs is read at 12 or 8 bits; the output's size comes from the 8-bit V of the largest weight in each of 32 residue
    classes. Their kernel is for one query head per KV head; with grouped queries a number is read at the most bits that any
    head wants, once.
    """

    name: str = "AlignedKV rule"
    value_steps: tuple[int, int] = (4, 8)
    block: int = 64
    probes: int = 32

    def prepare(self, key: torch.Tensor, value: torch.Tensor) -> PreparedLayer:
        planes = [[_truncate(rows.half(), bits).float() for bits in (8, 12, 16)] for rows in (key, value)]
        top_key, top_value = (rows.half().abs().cummax(2).values for rows in (key, value))
        return _AlignedKVLayer(self, planes[0], planes[1], top_key, top_value)


@dataclass(frozen=True)
class _AlignedKVLayer:
    method: AlignedKVRule
    key: list[torch.Tensor]
    value: list[torch.Tensor]
    top_key: torch.Tensor
    top_value: torch.Tensor

    def attend(self, query: torch.Tensor, length: int, scale: float) -> Step:
        old, heads = length // self.method.block * self.method.block, self.key[0].shape[1]
        whole = (length - old) * (self.key[0].shape[3] + self.value[0].shape[3]) * 2.0 * heads
        if old == 0:
            return Step(attend(query, self.key[2][:, :, :length], self.value[2][:, :, :length], scale), whole)
        groups = query.half().reshape(1, heads, -1, query.shape[-1])
        exponents = _exponent(groups) + _exponent(self.top_key[:, :, old - 1 : old])
        below = exponents.amax(-1, keepdim=True) - exponents  # [1, H, G, Dk]
        channels = torch.where(below >= 8, 0, torch.where(below >= 4, 1, 2)).amax(
            2
        )  # the most bits that a head of the group wants
        key = _select([plane[:, :, :old] for plane in self.key], channels[:, :, None, :])
        weights = softmax_rows(query, torch.cat([key, self.key[2][:, :, old:length]], 2), scale).half()
        tokens = self._value_planes(weights[..., :old], old)
        value = _select([plane[:, :, :old] for plane in self.value], tokens[..., None])
        output = weigh(weights.float(), torch.cat([value, self.value[2][:, :, old:length]], 2))
        sizes = torch.tensor([1.0, 1.5, 2.0])
        read = sizes[channels].sum() * old + sizes[tokens].sum() * value.shape[3]
        return Step(output, float(read) + whole)

    def _value_planes(self, weights: torch.Tensor, old: int) -> torch.Tensor:
        """Index of the plane set for each token, int64 ``[1, H, old]``."""
        probes, group = self.method.probes, weights.shape[2]
        padded = torch.nn.functional.pad(weights, (0, -old % probes)).unflatten(3, (-1, probes))
        best, row = padded.max(3)
        positions = (row * probes + torch.arange(probes)).clamp_max(old - 1)  # [1, H, G, probes]
        rows = self.value[0][:, :, :old].abs()
        picked = torch.gather(
            rows[:, :, None].expand(-1, -1, group, -1, -1), 3, positions[..., None].expand(*positions.shape, rows.shape[3])
        )
        size = (best.float()[..., None] * picked).sum(3).half()  # [1, H, G, Dv]
        wanted = (_exponent(size) - 1 + FP16_EXPONENT_BIAS - _exponent(self.top_value[:, :, old - 1 : old])).amin(
            -1, keepdim=True
        )
        below = wanted * 1024 - weights.view(torch.int16).int()  # in steps of 1 / 1024 of an exponent
        twelve, eight = (1024 * step for step in self.method.value_steps)
        return torch.where(below >= eight, 0, torch.where(below >= twelve, 1, 2)).amax(2)


def _truncate(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """The first ``bits`` bits of fp16 numbers, the rest replaced by half of their unit."""
    if bits == 16:
        return numbers
    words, dropped = numbers.view(torch.int16), 16 - bits
    return (words & -(1 << dropped) | 1 << (dropped - 1)).view(torch.float16)


def _exponent(numbers: torch.Tensor) -> torch.Tensor:
    """Biased exponent field of fp16 numbers, int32."""
    return numbers.view(torch.int16).int() >> 10 & 31


def _select(planes: list[torch.Tensor], index: torch.Tensor) -> torch.Tensor:
    """``planes[index]`` elementwise."""
    return torch.where(index == 0, planes[0], torch.where(index == 1, planes[1], planes[2]))


METHODS: tuple[Method, ...] = (
    RowFormat("fp8 e4m3", fp8(torch.float8_e4m3fn), lambda dim: dim),
    RowFormat("fp8 e5m2", fp8(torch.float8_e5m2), lambda dim: dim),
    RowFormat("int8 rows", int8_rows, lambda dim: dim + 2),
    Kivi(),
    AlignedKVRule(),
    AlignedKVRule("AlignedKV code", value_steps=(1, 2)),
)
"""What ``--compare`` runs."""
