"""Any configuration of transformers, tiny: the same structural switches, a layer or two of each kind, small sizes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from zoo_rules import HEAD_DIM, HEADS, KV_HEADS, VOCABULARY, cap_of

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")
_PER_LAYER_KIND = re.compile(r"type|rope_layers|pattern|block|moe|attention")
"""Lists with one entry per layer that say what kind of layer it is."""
_MOST_KINDS = 5
_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_TOKEN_ENTRIES = ("token_id", "token_index", "token_ids")
_OTHER_TOKEN_ENTRIES = ("ignore_id", "image_token", "speech_token_id")
_FIRST_SPARE_TOKEN = 110
"""Tokens from here on stand for images, audio and the like; text is drawn from those below."""


@dataclass
class _Tokens:
    """Hands out the ids of tokens that the small vocabulary has no room for."""

    next_id: int = _FIRST_SPARE_TOKEN
    largest: int = field(default=VOCABULARY - 1)

    def take(self) -> int:
        taken, self.next_id = self.next_id, min(self.next_id + 1, self.largest)
        return taken


def shrink(config: Mapping[str, Any]) -> dict[str, Any]:
    """The tiny form of ``config.to_dict()``; subconfigurations are shrunk likewise."""
    return _shrink(config, _Tokens())


def _shrink(config: Mapping[Any, Any], tokens: _Tokens) -> dict[str, Any]:
    layers = next((config[name] for name in _LAYER_COUNTS if _is_int(config.get(name))), 0)
    kept = _layers_of_each_kind(config, layers)
    return dict(_entries(config, layers, kept, tokens))


def _entries(config: Mapping[Any, Any], layers: int, kept: list[int] | None, tokens: _Tokens) -> Iterator[tuple[Any, Any]]:
    latent = bool(config.get("kv_lora_rank"))
    for name, value in config.items():
        if name in ("id2label", "label2id"):
            continue
        if not isinstance(name, str):  # layer numbers
            yield name, value
        elif latent and name in ("head_dim", "num_key_value_heads") and _is_int(value):
            yield name, _latent_size(name, value, config)
        elif name == "per_layer_config" and isinstance(value, Mapping):
            yield name, _per_layer_config(value, config, kept or [], tokens)
        elif isinstance(value, Mapping):
            yield name, _shrink(value, tokens)
        elif name.endswith(_TOKEN_ENTRIES) or name in _OTHER_TOKEN_ENTRIES:
            yield name, _token(name, value, tokens)
        elif isinstance(value, list):
            yield name, _list(name, value, layers, kept)
        elif _is_int(value) and name in _LAYER_COUNTS and name != "decoder_layers" and kept is not None:
            yield name, len(kept)
        else:
            yield name, _capped(name, value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _capped(name: str, value: Any) -> Any:
    cap = cap_of(name) if _is_int(value) else None
    return value if cap is None else min(value, cap)


def _layers_of_each_kind(config: Mapping[str, Any], layers: int) -> list[int] | None:
    """Numbers of the layers to keep, the first of each kind and two at least; None where nothing is said per layer."""
    lists = {name: v for name, v in config.items() if isinstance(v, list) and layers > 2 and len(v) == layers}
    if not lists:
        return None
    kinds = list(zip(*(map(str, v) for name, v in sorted(lists.items()) if _PER_LAYER_KIND.search(name)), strict=True))
    first = [index for index, kind in enumerate(kinds) if kinds.index(kind) == index]
    return first[:_MOST_KINDS] if len(first) > 1 else [0, 1]


def _per_layer_config(
    entries: Mapping[Any, Any], config: Mapping[str, Any], kept: list[int], tokens: _Tokens
) -> dict[int, Any]:
    """Overrides of single layers, by layer number; a head that is larger than elsewhere stays larger."""
    result = {}
    for number, override in entries.items():
        if int(number) in kept:
            small = _shrink(override, tokens)
            sizes = (override.get("head_dim"), config.get("head_dim"))
            if all(map(_is_int, sizes)) and sizes[0] > sizes[1]:
                small["head_dim"] = 2 * HEAD_DIM
            result[kept.index(int(number))] = small
    return result


def _latent_size(name: str, value: int, config: Mapping[str, Any]) -> int:
    """With multi-head latent attention two entries repeat others, each model in its own way."""
    if name == "num_key_value_heads":
        return HEADS if value == config.get("num_attention_heads") else min(value, KV_HEADS)
    rope, nope, v = (config.get(f"{part}_head_dim") or 0 for part in ("qk_rope", "qk_nope", "v"))
    if value == rope:
        return cap_of("qk_rope_head_dim") or value
    if value == v and v != nope:
        return cap_of("v_head_dim") or value
    return cap_of("qk_head_dim" if value == rope + nope else "head_dim") or value


def _token(name: str, value: Any, tokens: _Tokens) -> Any:
    if _is_int(value):
        if name in _SPECIAL_TOKENS:
            return _SPECIAL_TOKENS[name]
        return value if value < VOCABULARY else tokens.take()
    if isinstance(value, list | tuple) and value and all(map(_is_int, value)):
        return [2] if "eos" in name else [min(token, VOCABULARY - 1) for token in value]
    return value


def _list(name: str, value: list[Any], layers: int, kept: list[int] | None) -> list[Any]:
    if kept is not None and len(value) == layers:
        value = [value[index] for index in kept]
    if not value or not all(map(_is_int, value)):
        return value
    return _rotary_sections(value) if "mrope_section" in name else [_capped(name, entry) for entry in value]


def _rotary_sections(sections: list[int], total: int = HEAD_DIM // 2) -> list[int]:
    """Sections in about the same proportions that add up to half a head."""
    if sum(sections) <= total:
        return sections
    small = [max(1, section * total // sum(sections)) for section in sections]
    while sum(small) != total:
        excess = sum(small) > total
        index = small.index(max(small) if excess else min(small))
        small[index] += -1 if excess else 1
    return small
