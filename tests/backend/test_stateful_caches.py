"""Random lives of Hugging Face caches, every step beside stock: prefill, decode, reset, crop, fork, reorder, eager writes.

Each cache under test has a twin that only stock eager code touches. After every rule the outputs and the whole content of
all caches alive are compared. What is left out, because a view cannot give it (see ``append_buffers``): an in-place edit of a
dynamic cache while another cache still holds an older or newer view of the same rows.
"""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, multiple, rule
from transformers import DynamicCache, LlamaConfig, StaticCache

BATCH, HEADS, KV_HEADS, HEAD_DIM, CAPACITY = 2, 4, 2, 16, 96
EXACT = {"rtol": 1e-5, "atol": 1e-5}
"""What a different order of fp32 sums may change."""
TOLERANCE, ACCURACY = 2.0, torch.bfloat16
BUDGET = 6 * TOLERANCE * 2.0**-8 / math.sqrt(8 * math.log(2))
"""Allowed error of a head's output over its norm: the tolerance bounds the rms error, six sigma bound what a test may see."""

CONFIG = LlamaConfig(num_hidden_layers=1, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, hidden_size=HEADS * HEAD_DIM)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: Any, mask: torch.Tensor) -> torch.Tensor:
    """One attention layer over a Hugging Face cache."""
    keys, values = cache.update(key, value, 0)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)


class Twins:
    """A cache, what stock eager made of the same history, and its number of live rows."""

    def __init__(self, ours: Any, stock: Any, length: int = 0) -> None:
        self.ours, self.stock, self.length = ours, stock, length

    @property
    def is_static(self) -> bool:
        return isinstance(self.ours, StaticCache)

    def layers(self) -> tuple[Any, Any]:
        return self.ours.layers[0], self.stock.layers[0]


class CacheLives(RuleBasedStateMachine):
    """The rules; :class:`ExactLives` and :class:`AlignedLives` say with which options."""

    OPTIONS: ClassVar[dict[str, object]]
    ROWS: ClassVar[tuple[int, ...]] = (1, 3)
    """Query lengths of decode steps; each is some graphs, and a graph with an aligned kernel takes its time to compile."""
    caches = Bundle("caches")

    @initialize()
    def start(self) -> None:
        torch.manual_seed(0)
        self.alive: list[Twins] = []
        self.guard = torch.no_grad()
        self.guard.__enter__()

    def teardown(self) -> None:
        if hasattr(self, "guard"):
            self.guard.__exit__(None, None, None)

    @classmethod
    def compiled(cls) -> Any:
        """Compiled once per class: recompiling for each example would take hours."""
        if "_compiled" not in cls.__dict__:
            cls._compiled = staticmethod(torch.compile(attend, backend="alignedkv", options=cls.OPTIONS))
        return cls._compiled

    def add(self, twins: Twins) -> Twins:
        self.alive.append(twins)
        return twins

    @rule(target=caches)
    def new_static(self) -> Twins:
        return self.add(Twins(StaticCache(CONFIG, max_cache_len=CAPACITY), StaticCache(CONFIG, max_cache_len=CAPACITY)))

    @rule(target=caches)
    def new_dynamic(self) -> Twins:
        return self.add(Twins(DynamicCache(config=CONFIG), DynamicCache(config=CONFIG)))

    def step(self, twins: Twins, rows: int, function: Any, exact: bool) -> None:
        if twins.length + rows > CAPACITY:
            return
        query = torch.randn(BATCH, HEADS, rows, HEAD_DIM)
        key, value = torch.randn(BATCH, KV_HEADS, rows, HEAD_DIM), torch.randn(BATCH, KV_HEADS, rows, HEAD_DIM)
        columns = CAPACITY if twins.is_static else twins.length + rows
        last = torch.arange(twins.length, twins.length + rows)
        mask = (torch.arange(columns)[None] <= last[:, None])[None, None]
        expected = attend(query, key, value, twins.stock, mask)
        output = function(query, key, value, twins.ours, mask)
        twins.length += rows
        if exact:
            torch.testing.assert_close(output, expected, **EXACT)
        else:
            error = (output - expected).norm(dim=-1) / expected.norm(dim=-1)
            assert error.max() <= BUDGET, f"relative error {error.max():.2e}, allowed {BUDGET:.2e}"

    def decode_again(self, twins: Twins, rows: int = 1) -> None:
        if twins.length == 0:
            self.step(twins, 5, attend, exact=True)
        self.step(twins, rows, self.compiled(), exact=self.OPTIONS["tolerance"] == 0.0)

    @rule(twins=caches, rows=st.sampled_from([1, 1, 1, 3]), times=st.integers(1, 4))
    def decode(self, twins: Twins, rows: int, times: int) -> None:
        for _ in range(times):
            self.decode_again(twins, rows if rows in self.ROWS else 1)

    @rule(twins=caches)
    def compiled_prefill(self, twins: Twins) -> None:
        if twins.length > 0:
            self.step(twins, 20, self.compiled(), exact=self.OPTIONS["tolerance"] == 0.0)

    @rule(twins=caches, rows=st.integers(1, 30))
    def eager_step(self, twins: Twins, rows: int) -> None:
        self.step(twins, rows, attend, exact=True)

    @rule(twins=caches)
    def reset(self, twins: Twins) -> None:
        if twins.is_static:
            twins.ours.reset()
            twins.stock.reset()
            twins.length = 0

    @rule(twins=caches, count=st.integers(1, 10))
    def crop(self, twins: Twins, count: int) -> None:
        if not twins.is_static and twins.length > count:
            twins.ours.crop(-count)
            twins.stock.crop(-count)
            twins.length -= count

    @rule(target=caches, twins=caches)
    def fork_by_deepcopy(self, twins: Twins) -> Any:
        if len(self.alive) > 5:
            return multiple()
        return self.add(Twins(copy.deepcopy(twins.ours), copy.deepcopy(twins.stock), twins.length))

    @rule(target=caches, twins=caches)
    def fork_over_the_same_tensors(self, twins: Twins) -> Any:
        """Both go on from one past, which compiled code handed out: the second continuation must be a copy."""
        if twins.is_static or twins.length > CAPACITY - 20 or len(self.alive) > 5:
            return multiple()
        self.decode_again(twins)
        other = Twins(DynamicCache(config=CONFIG), DynamicCache(config=CONFIG), twins.length)
        for mine, theirs in zip(other.layers(), twins.layers(), strict=True):
            mine.lazy_initialization(theirs.keys, theirs.values)
            mine.keys, mine.values = theirs.keys, theirs.values
        self.add(other)
        for continued in (twins, other, twins):
            self.decode_again(continued)
        return other

    @rule(twins=caches, order=st.lists(st.integers(0, BATCH - 1), min_size=BATCH, max_size=BATCH))
    def reorder(self, twins: Twins, order: list[int]) -> None:
        if twins.length > 0:
            twins.ours.reorder_cache(torch.tensor(order))
            twins.stock.reorder_cache(torch.tensor(order))

    @rule(
        twins=caches,
        row=st.integers(0, CAPACITY - 1),
        scale=st.sampled_from([-2.0, 0.5, 30.0]),
        which=st.sampled_from(["keys", "values"]),
    )
    def eager_write(self, twins: Twins, row: int, scale: float, which: str) -> None:
        if twins.length == 0 or self.shares_rows(twins):
            return
        for layer in twins.layers():
            getattr(layer, which)[:, :, row % twins.length] *= scale
        self.decode_again(twins)

    def shares_rows(self, twins: Twins) -> bool:
        """Whether another cache views the same storage."""
        storage = twins.layers()[0].keys.untyped_storage().data_ptr()
        others = [other.layers()[0].keys for other in self.alive if other is not twins and other.length > 0]
        return any(keys.untyped_storage().data_ptr() == storage for keys in others)

    @rule(twins=consumes(caches))
    def drop(self, twins: Twins) -> None:
        self.alive.remove(twins)

    def check_contents(self) -> None:
        for twins in self.alive:
            ours, stock = twins.layers()
            if twins.length > 0:
                assert torch.equal(ours.keys, stock.keys)
                assert torch.equal(ours.values, stock.values)

    def check_invariants(self, *args: Any, **kwargs: Any) -> None:
        if hasattr(self, "alive"):
            self.check_contents()
        super().check_invariants(*args, **kwargs)


class ExactLives(CacheLives):
    OPTIONS: ClassVar[dict[str, object]] = {"tolerance": 0.0, "strict": True}


class AlignedLives(CacheLives):
    OPTIONS: ClassVar[dict[str, object]] = {"tolerance": TOLERANCE, "accuracy": ACCURACY, "min_context": 0, "strict": True}
    ROWS: ClassVar[tuple[int, ...]] = (1,)


@pytest.mark.parametrize("lives", [pytest.param(ExactLives, marks=pytest.mark.slow), AlignedLives])
def test_caches_live_as_in_stock(lives: type[CacheLives]) -> None:
    # static and dynamic, three query lengths, pasts with the strides of a tensor and of a buffer's view: more than 8 graphs
    with torch._dynamo.config.patch(recompile_limit=64, accumulated_recompile_limit=512):
        test = lives.TestCase
        # a step costs a millisecond once its graph is compiled, so examples are cheap here
        test.settings = settings(settings.default, max_examples=3 * settings.default.max_examples, stateful_step_count=40)
        test("runTest").runTest()
