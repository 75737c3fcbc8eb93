"""Peers within torch: this backend's own kernel, scaled_dot_product_attention, flex_attention and what transformers can do."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch.nn.attention.flex_attention import flex_attention

from attention_inputs import Shape
from attention_variants import ALIGNED, DESCRIPTIONS, GROUPED, PACKED, REPEATED, STREAM, Call, Prepared, make_calls
from peers_base import Copy, Opening, Peer, PeerRefusalError, require

FLEX, FORCED = "flex_attention", "transformers FORCE_GQA"
FORCE_GQA = "TRANSFORMERS_SDPA_FORCE_GQA"


def torch_peers(tolerance: float) -> list[Peer]:
    """Ours first, then stock.

    Args:
        tolerance: of the aligned read.
    """
    peers = [
        Peer(name, DESCRIPTIONS[name], functools.partial(_open_variant, name, tolerance))
        for name in (ALIGNED, STREAM, PACKED, REPEATED, GROUPED)
    ]
    peers.append(
        Peer(
            FLEX,
            "compiled by Inductor, enable_gqa, no mask: for one query row its C++ template for flex decoding",
            lambda shape, dtype: _opening(_flex()),
        )
    )
    peers.append(
        Peer(
            FORCED,
            f"transformers' sdpa_attention_forward compiled by Inductor, bool mask, {FORCE_GQA}=1: enable_gqa in place of"
            " repeated K and V, which a model with StaticCache gets only by this variable",
            lambda shape, dtype: _opening(_forced(shape)),
            package="transformers",
        )
    )
    return peers


def _open_variant(name: str, tolerance: float, shape: Shape, dtype: torch.dtype) -> Opening:
    return _opening(make_calls(tolerance, None)[name], counts_planes=name == ALIGNED)


def _opening(call: Call, *, counts_planes: bool = False) -> Opening:
    """All of torch's peers read the layer's own tensors; the aligned read keeps planes beside them."""

    def open_copy(prepared: Prepared) -> Copy:
        run: Callable[[], torch.Tensor] = functools.partial(call, prepared)
        return Copy(run, run, prepared.layer.bytes_full + (prepared.planes.nbytes if counts_planes else 0))

    return open_copy


def _flex() -> Call:
    compiled = torch.compile(functools.partial(flex_attention, enable_gqa=True), fullgraph=True)
    return lambda prepared: compiled(prepared.layer.query, prepared.layer.key, prepared.layer.value)


def _forced(shape: Shape) -> Call:
    """transformers' own attention function, as a compiled model with a StaticCache calls it.

    Raises:
        PeerRefusalError: no transformers, or one that does not know the variable.
    """
    integration = require("transformers.integrations.sdpa_attention", "transformers")
    if FORCE_GQA not in inspect.getsource(integration):
        raise PeerRefusalError(f"this version of transformers does not read {FORCE_GQA}")
    # Read while tracing, at the first call; nothing else of this benchmark goes through transformers.
    os.environ[FORCE_GQA] = "1"
    module = SimpleNamespace(num_key_value_groups=shape.group, is_causal=True)

    def forced(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = integration.sdpa_attention_forward(module, query, key, value, mask)[0]
        return output.transpose(1, 2)

    compiled = torch.compile(forced, fullgraph=True)
    return lambda prepared: compiled(prepared.layer.query, prepared.layer.key, prepared.layer.value, prepared.mask)
