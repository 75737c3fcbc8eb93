"""One end-to-end run of a real model: SmolLM2-135M, StaticCache, alignedkv against stock eager and fp32."""

from __future__ import annotations

import pytest
import torch

import alignedkv_compile
from alignedkv_compile.demo.document import long_document
from alignedkv_compile.demo.model import DemoUnavailableError, find_weights, load_smollm2
from alignedkv_compile.demo.prefill import prefill
from alignedkv_compile.demo.quality import teacher_forced
from alignedkv_compile.demo.variants import ALIGNED, EAGER, Variant

CONTEXT, POSITIONS, CAPACITY, LAYERS = 1024, 12, 1088, 30


def test_smollm2_decodes_as_well_as_stock_and_reads_less():
    try:
        find_weights()
    except DemoUnavailableError as error:
        pytest.skip(str(error))
    loaded = load_smollm2()
    tokens = long_document(loaded.tokenizer, CONTEXT + POSITIONS + 1).tokens
    past, reference = prefill(loaded.model, tokens[:, : CONTEXT + POSITIONS], POSITIONS)
    alignedkv_compile.reset_report()
    compiled = torch.compile(loaded.model, backend="alignedkv", options={"stats": True, "strict": True})

    quality = {
        variant.name: teacher_forced(variant, past.static_cache(CONTEXT, CAPACITY), CONTEXT, tokens[:, CONTEXT:], reference)
        for variant in (Variant(EAGER, loaded.model), Variant(ALIGNED, compiled))
    }
    report = alignedkv_compile.report()
    assert report.rewritten == LAYERS
    assert report.declined == 0

    # Both make bfloat16 errors in every other operator; at the default tolerance attention adds about its own rounding error.
    assert 0 < quality[ALIGNED].kl_mean < 2 * quality[EAGER].kl_mean
    assert quality[ALIGNED].top1_agreement >= quality[EAGER].top1_agreement - 1 / POSITIONS

    stats = alignedkv_compile.stats()
    assert len(stats.layers) == LAYERS
    assert all(layer.calls == POSITIONS for layer in stats.layers)
    assert 0.1 < stats.fraction < 0.6
