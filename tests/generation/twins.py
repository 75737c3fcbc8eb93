"""A tiny model twice: stock, and with its forward compiled as docs/usage.md says, by the backend without Inductor.

Tracing takes most of the time, so each graph is rewritten once for every variant of the options, and a test generates once per
variant through the same compiled forward.
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from transformers import DynamicCache, StaticCache
from zoo_backend import pass_only
from zoo_classes import ZooClass
from zoo_models import tiny_model

from alignedkv_compile.contract import Outcome
from alignedkv_compile.reasons import Reason
from alignedkv_compile.report import GraphReport

EVERY_BIT, ALIGNED = "every bit", "aligned"
VARIANTS: Mapping[str, Mapping[str, object]] = {
    EVERY_BIT: {"tolerance": 0.0, "min_context": 0},
    # fp32 leaves nothing to skip: in the units of bfloat16 the planes are really what is read
    ALIGNED: {"tolerance": 2.0, "min_context": 0, "accuracy": "bfloat16"},
}
SUMMATION = 1e-4
"""What another order of fp32 sums may change in a logit."""
CACHES: Mapping[str, Mapping[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
}
"""What ``generate`` is told; the forward is compiled already, so that transformers need not."""
slow = pytest.mark.slow


class Rewriting:
    """A Dynamo backend: passes, stores and runtime are the real ones, operators run eagerly.

    Attributes:
        selected: the variant whose form of each graph is called.
        graphs: the reports of each graph that Dynamo handed over, by variant.
        calls: by variant, how often sites with each outcome were called.
    """

    def __init__(self, variants: Mapping[str, Mapping[str, object]] = VARIANTS) -> None:
        self._variants = variants
        self.selected = next(iter(variants))
        self.graphs: list[dict[str, GraphReport]] = []
        self.calls: dict[str, Counter[Outcome]] = {name: Counter() for name in variants}
        self._lock = threading.Lock()

    def __call__(self, gm: GraphModule, example_inputs: Sequence[object], **_: object) -> Callable[..., Sequence[object]]:
        runs = {name: pass_only(gm, example_inputs, options) for name, options in self._variants.items()}
        self.graphs.append({name: report for name, (_, report) in runs.items()})

        def call(*inputs: object) -> Sequence[object]:
            run, report = runs[self.selected]
            with self._lock:
                self.calls[self.selected].update(site.outcome for site in report.sites)
            return run(*inputs)

        return call

    def each(self) -> Iterator[str]:
        """Select one variant after the other."""
        for variant in self._variants:
            self.selected = variant
            yield variant

    @property
    def rewritten(self) -> int:
        """Attention calls of the selected variant that ran as aligned reads."""
        return self.calls[self.selected][Outcome.REWRITTEN]

    @property
    def declined(self) -> Counter[Reason | None]:
        """Why sites of the selected variant were declined, with the number of sites."""
        sites = [site for graph in self.graphs for site in graph[self.selected].sites]
        return Counter(site.kind for site in sites if site.outcome is Outcome.DECLINED)

    @property
    def notes(self) -> set[str]:
        """What the runtime remarked in the selected variant: every reason for planes that were not read."""
        return {note for graph in self.graphs for note in graph[self.selected].notes}


def tiny(name: str, model_type: str) -> Any:
    """A tiny model of a class, two layers with random weights. It has no end token: as many tokens come as are asked for."""
    with torch.no_grad():
        model = tiny_model(ZooClass(name, model_type, "")).module
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    if model.config.is_encoder_decoder:
        model.generation_config.decoder_start_token_id = 1
    return model


def llama(layers: int = 1) -> Any:
    """The model of most tests; of its layers as few as do, since tracing each takes time."""
    model = tiny("LlamaForCausalLM", "llama")
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    return model


def mistral() -> Any:
    """A model with sliding windows of ten rows."""
    return tiny("MistralForCausalLM", "mistral")


def new_cache(kind: str, model: Any) -> Any:
    """An empty cache, of 64 rows when it is static."""
    config = model.config
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=64)


def prompt(rows: int, batch: int = 2, seed: int = 5) -> torch.Tensor:
    """Random tokens int64 ``[batch, rows]``, no special ones."""
    return torch.randint(3, 80, (batch, rows), generator=torch.Generator().manual_seed(seed))


def compiled(model: Any, backend: Callable[..., object]) -> Any:
    """A copy of a model whose forward is compiled."""
    model = copy.deepcopy(model)
    model.forward = torch.compile(model.forward, backend=backend)
    return model


class Twins:
    """A model and its compiled copy.

    Attributes:
        stock, ours: the two.
        backend: what compiled the latter.
    """

    def __init__(self, model: Any, backend: Rewriting | None = None) -> None:
        self.stock = model
        self.backend = Rewriting() if backend is None else backend
        self.ours = compiled(model, self.backend)

    def generate(self, *, varying: bool = False, **inputs: Any) -> Any:
        """What stock generates; every variant must generate the same, through rewritten attention.

        Args:
            varying: queries may all be of several rows whose number varies, which keep stock attention.
        """
        expected = generate(self.stock, **inputs)
        error = rounding_error(self.stock, expected, inputs)
        for variant in self.backend.each():
            before = self.backend.rewritten
            calls = self.backend.calls[variant]
            kept = calls[Outcome.PREFILL]
            actual = generate(self.ours, **inputs)
            assert_same(actual, expected, SUMMATION if variant == EVERY_BIT else error)
            assert self.backend.rewritten > before or (varying and calls[Outcome.PREFILL] > kept), "nothing was rewritten"
        return expected


def generate(model: Any, *, seed: int = 7, max_new_tokens: int = 8, **inputs: Any) -> Any:
    """``model.generate`` with everything that can be compared."""
    torch.manual_seed(seed)
    defaults = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    return model.generate(max_new_tokens=max_new_tokens, **{**defaults, **inputs})


def rounding_error(model: Any, generated: Any, inputs: Mapping[str, Any]) -> float:
    """The largest error of a logit that the model makes in bfloat16 on what it generated.

    The aligned read may add twice the rounding error of bfloat16 to attention alone; the whole model rounds everywhere.
    """
    tokens = generated.sequences
    names = ("input_ids", "pixel_values", "input_features", "image_grid_thw", "mm_token_type_ids")
    forward = {name: inputs[name] for name in names if name in inputs}
    forward["decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"] = tokens
    for name, value in forward.items():
        if value.shape[0] != tokens.shape[0] and name != "pixel_values":
            forward[name] = value.repeat_interleave(tokens.shape[0] // value.shape[0], 0)
    if "mm_token_type_ids" in forward:
        forward["mm_token_type_ids"] = torch.nn.functional.pad(
            forward["mm_token_type_ids"], (0, tokens.shape[1] - forward["mm_token_type_ids"].shape[1])
        )
    rounded = {name: value.bfloat16() if value.is_floating_point() else value for name, value in forward.items()}
    new = len(generated.logits)
    with torch.no_grad():
        exact, coarse = model(**forward), copy.deepcopy(model).bfloat16()(**rounded)
    return float((exact.logits[:, -new:] - coarse.logits[:, -new:]).abs().max())


def assert_same(actual: Any, expected: Any, budget: float) -> None:
    """Equal tokens; logits, or scores of whole beams, within ``budget``."""
    assert torch.equal(actual.sequences, expected.sequences)
    if "sequences_scores" in expected:
        torch.testing.assert_close(actual.sequences_scores, expected.sequences_scores, rtol=0, atol=budget)
        return
    assert len(actual.logits) == len(expected.logits)
    for ours, stock in zip(actual.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, stock, rtol=0, atol=budget)
