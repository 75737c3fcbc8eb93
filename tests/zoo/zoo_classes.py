"""Which classes are generative: what the auto classes of transformers name, each class once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

GROUPS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "vision": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "multimodal": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
}
"""The auto mappings of classes that generate tokens, by the name that results use. A class belongs to the first that has it."""


@dataclass(frozen=True, order=True)
class ZooClass:
    """One generative class.

    Attributes:
        name: of the class in ``transformers``.
        model_type: of the configuration that it is listed for.
        group: key of :data:`GROUPS`.
    """

    name: str
    model_type: str
    group: str


def generative_classes() -> tuple[ZooClass, ...]:
    """Every generative class, sorted by name."""
    found: dict[str, ZooClass] = {}
    for group, mapping in GROUPS.items():
        for model_type, names in getattr(modeling_auto, mapping).items():
            for name in (names,) if isinstance(names, str) else names:
                if name not in found or (found[name].group == group and _is_namesake(name, model_type)):
                    found[name] = ZooClass(name, model_type, group)
    return tuple(sorted(found.values()))


def _is_namesake(name: str, model_type: str) -> bool:
    """Whether a class is listed for the model type that it was written for, ``Llama`` rather than a kin of it."""
    return name.startswith(CONFIG_MAPPING_NAMES.get(model_type, "?").removesuffix("Config"))


def select(classes: Iterable[ZooClass], names: Iterable[str]) -> tuple[ZooClass, ...]:
    """Those whose class name or model type is among ``names``, upper or lower case; all when there are none.

    Raises:
        KeyError: a name selects nothing.
    """
    wanted = [name.strip().lower() for name in names if name.strip()]
    everything = tuple(classes)
    for name in wanted:
        if not any(name in (entry.name.lower(), entry.model_type.lower()) for entry in everything):
            raise KeyError(name)
    return tuple(e for e in everything if not wanted or e.name.lower() in wanted or e.model_type.lower() in wanted)
