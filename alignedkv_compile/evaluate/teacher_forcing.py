"""Run a model over the true continuation of a text with one method's attention in every layer.

All positions go through the model in one forward pass, while attention answers them one by one, each over exactly the cache
rows that it would find when decoding. Causality makes this the same computation as decoding token by token.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..demo.prefill import Past
from ..options import UNIT_ROUNDOFF
from ..precision import KAPPA
from .errors import EvaluationError
from .methods import Method, PreparedLayer, cache_bytes

IMPLEMENTATION = "alignedkv_eval"
"""Name under which the attention is registered with ``transformers``."""
REFUSED = ("softcap", "s_aux", "position_bias")
"""Arguments of attention functions that change the softmax, which the methods do not know."""


@dataclass
class Reading:
    """What one method did over a whole pass.

    Attributes:
        bytes_read, bytes_full: summed over layers and positions; ``bytes_full`` is the cache in its own dtype.
        errors: float64 ``[layers, probes, Hq]``, relative error of the output as the model gets it, against float64.
        added: float64 ``[layers, probes, Hq]``, error before the output is rounded, in units of the rounding error ``rho`` that
            this rounding makes; None when the method computes in 16 bits.
    """

    bytes_read: float = 0.0
    bytes_full: float = 0.0
    errors: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    added: torch.Tensor | None = None


@dataclass
class _Pass:
    """State of one forward pass: the attention function appends to it, layer by layer."""

    method: Method
    probes: tuple[int, ...]
    advance: Callable[[int], None]
    reading: Reading = field(default_factory=Reading)
    errors: list[torch.Tensor] = field(default_factory=list)
    added: list[torch.Tensor] = field(default_factory=list)


@torch.no_grad()
def run(
    model: Any, method: Method, past: Past, context: int, tokens: torch.Tensor, probes: int, advance: Callable[[int], None]
) -> tuple[torch.Tensor, Reading]:
    """Log-probabilities after every token, and what the method read.

    Args:
        model: in the dtype of ``past``.
        method: answers every layer's attention.
        past: the document's K and V; its first ``context`` rows are used.
        context: tokens before the first of ``tokens``.
        tokens: int64 ``[1, P]``.
        probes: at how many of the positions attention is compared with float64.
        advance: called with 1 after every layer.

    Returns:
        float32 ``[P, vocabulary]`` and the :class:`Reading`.

    Raises:
        EvaluationError: the model's attention is not the plain softmax over the whole past, or is not pluggable.
    """
    positions = tokens.shape[1]
    chosen = sorted({round(i * (positions - 1) / max(probes - 1, 1)) for i in range(probes)})
    state = _Pass(method, tuple(chosen), advance)
    with _plugged_in(model, state):
        logits = model(input_ids=tokens, past_key_values=past.dynamic_cache(context), logits_to_keep=positions).logits
    if not state.errors:
        raise EvaluationError(f"{type(model).__name__} does not run its attention through transformers' AttentionInterface")
    state.reading.errors = torch.stack(state.errors)
    state.reading.added = torch.stack(state.added) if state.added else None
    return logits[0].float().log_softmax(-1), state.reading


@contextlib.contextmanager
def _plugged_in(model: Any, state: _Pass) -> Iterator[None]:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(IMPLEMENTATION, functools.partial(_attention, state))
    AttentionMaskInterface.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    before = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attention(
    state: _Pass,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """``transformers``' attention function: ``query [1, Hq, P, Dk]`` over ``key [1, H, T, Dk]``; returns ``[1, P, Hq, Dv]``."""
    _require_plain_attention(module, attention_mask, query.shape[2], key.shape[2], options)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer, before = state.method.prepare(key, value), key.shape[2] - query.shape[2]
    outputs = []
    errors: list[torch.Tensor] = []
    added: list[torch.Tensor] = []
    for position in range(query.shape[2]):
        row, length = query[:, :, position : position + 1], before + position + 1
        output = _step(state, layer, row, key, value, length, scale)
        outputs.append(output.to(query.dtype))
        if position in state.probes:
            exact = exact_attention(row, key[:, :, :length], value[:, :, :length], scale)
            errors.append(relative_error(outputs[-1], exact))
            if output.dtype == torch.float32 and query.dtype != torch.float32:
                added.append(relative_error(output, exact) / (float(KAPPA) * UNIT_ROUNDOFF[key.dtype]))
    state.errors.append(torch.stack(errors))
    if added:
        state.added.append(torch.stack(added))
    state.advance(1)
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def _step(
    state: _Pass,
    layer: PreparedLayer,
    row: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    length: int,
    scale: float,
) -> torch.Tensor:
    step = layer.attend(row, length, scale)
    state.reading.bytes_read += step.bytes_read
    state.reading.bytes_full += cache_bytes(key[:, :, :length], value[:, :, :length])
    return step.output


def exact_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of ``query [1, Hq, 1, Dk]`` in float64 on the stored values, ``[1, Hq, 1, Dv]``."""
    rows = query.double().reshape(1, key.shape[1], -1, query.shape[-1])
    weights = (rows @ key.double().mT * scale).softmax(-1)
    return (weights @ value.double()).reshape(1, query.shape[1], 1, value.shape[-1])


def relative_error(output: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Norm of the error over the norm of the exact output, float64 ``[Hq]``."""
    return ((output.double() - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-300)).flatten()


def _require_plain_attention(
    module: Any, mask: torch.Tensor | None, positions: int, length: int, options: dict[str, Any]
) -> None:
    name = type(module).__name__
    for option in REFUSED:
        if options.get(option) is not None:
            raise EvaluationError(f"{name} uses {option}, which the methods that are compared do not know")
    window = options.get("sliding_window")
    if window is not None and window < length:
        raise EvaluationError(
            f"{name} attends to a sliding window of {window} rows; only attention to the whole past is evaluated"
        )
    if mask is not None:
        causal = torch.arange(length) <= torch.arange(length - positions, length)[:, None]
        if not torch.equal((mask == 0).expand(1, mask.shape[1], positions, length)[0, 0], causal):
            raise EvaluationError(f"{name} masks more than the future; only attention to the whole past is evaluated")
