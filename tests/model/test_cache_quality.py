"""A small cut of `make eval` on SmolLM2-135M, against the limits of `alignedkv_compile/evaluate/caches/limits.py`."""

from __future__ import annotations

import pytest
from rich.console import Console

from alignedkv_compile.demo.model import DemoUnavailableError, find_weights
from alignedkv_compile.evaluate.caches.kinds import STOCK
from alignedkv_compile.evaluate.caches.limits import LIMITS, exceeded
from alignedkv_compile.evaluate.caches.result import CacheSettings
from alignedkv_compile.evaluate.caches.run import evaluate_caches
from alignedkv_compile.evaluate.caches.tasks import NEEDLE
from alignedkv_compile.storage import PACKED

CONTEXT, POSITIONS = 1024, 64


@pytest.mark.slow
def test_storage_modes_keep_their_limits():
    try:
        find_weights()
    except DemoUnavailableError as error:
        pytest.skip(str(error))
    baselines = tuple(limit.relative_to for limit in LIMITS if limit.relative_to not in (None, STOCK))
    kinds = tuple(dict.fromkeys((*PACKED, *baselines)))
    settings = CacheSettings(contexts=(CONTEXT,), positions=POSITIONS, retrieval_contexts=(CONTEXT,), kinds=kinds)
    result = evaluate_caches(settings, Console(quiet=True))
    assert not exceeded(result), "\n".join(exceeded(result))
    needle = {score.kind: score for score in result.retrieval if score.task == NEEDLE}
    assert needle[STOCK].right == needle[STOCK].questions, "else the needle says nothing about a cache"
    assert {limit.kind for limit in LIMITS} <= {STOCK, *kinds}, "every limit has been checked"
