"""Forms in which models write rows of a preallocated cache, and read its first ones."""

# ruff: noqa: ANN001 - fixtures and the functions that Dynamo traces read better bare

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from alignedkv_compile.contract import Outcome

HEADS, ROWS, DIM = 2, 64, 16
Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], None]


def by_index(cache, rows, positions, _):
    cache[:, :, positions] = rows


def by_index_and_ellipsis(cache, rows, positions, _):
    cache[..., positions, :] = rows


def by_slices_of_an_index(cache, rows, positions, _):
    cache[:, :, positions[: rows.shape[2]]] = rows


def by_slice(cache, rows, _, start):
    cache[:, :, start : start + rows.shape[2]] = rows


def by_slice_of_the_batch(cache, rows, _, start):
    cache[: rows.shape[0], :, start : start + rows.shape[2], :] = rows


def by_copy(cache, rows, _, start):
    cache[:, :, start : start + rows.shape[2]].copy_(rows)


def from_wider_rows(cache, rows, _, start):
    cache[:, :, start : start + rows.shape[2]] = rows.float()


FORMS: list[Write] = [
    by_index,
    by_index_and_ellipsis,
    by_slices_of_an_index,
    by_slice,
    by_slice_of_the_batch,
    by_copy,
    from_wider_rows,
]


class Layer(torch.nn.Module):
    """One attention with caches of its own, as hand-written decoders have it."""

    def __init__(self, write: Write, *, prefix: bool, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.write, self.prefix = write, prefix
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, HEADS, ROWS, DIM, dtype=dtype))

    def forward(self, query, key, value, positions, start):
        self.write(self.keys, key, positions, start)
        self.write(self.values, value, positions, start)
        rows = start + query.shape[2] if self.prefix else ROWS
        mask = torch.arange(rows) <= positions[:, None]
        keys, values = (cache[:, :, :rows] if self.prefix else cache for cache in (self.keys, self.values))
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask[None, None], enable_gqa=True)


def steps(layer: Callable[..., torch.Tensor], lengths: list[int]) -> list[torch.Tensor]:
    """Decode with new rows of these numbers, one after the other."""
    generator, outputs, start = torch.Generator().manual_seed(0), [], 0
    for length in lengths:
        query, key, value = (
            torch.randn(1, heads, length, DIM, generator=generator).bfloat16() for heads in (2 * HEADS, HEADS, HEADS)
        )
        positions = torch.arange(start, start + length)
        outputs.append(layer(query, key, value, positions, start))
        start += length
    return outputs


@pytest.mark.parametrize("prefix", [False, True], ids=["all rows", "first rows"])
@pytest.mark.parametrize("write", FORMS, ids=lambda write: write.__name__)
def test_each_form_is_rewritten(eager_backend, operations, monkeypatch, write: Write, prefix: bool) -> None:
    """Over many steps the outputs are stock's, the caches too, and planes are written and never made anew."""
    lengths = [1, 1, 1, 1, 3, 1, 1]
    stock = Layer(write, prefix=prefix)
    expected = steps(stock, lengths)
    exact, few = eager_backend(0.0), eager_backend(2.0)
    builder, built = few.stores._builder, []
    monkeypatch.setattr(builder, "rebuild", lambda *args, build=builder.rebuild: built.append(args) or build(*args))
    for backend in (exact, few):
        torch._dynamo.reset()
        ours = Layer(write, prefix=prefix)
        for actual, output in zip(steps(torch.compile(ours, backend=backend), lengths), expected, strict=True):
            rounding = 2.0**-8 * float(output.abs().max())
            torch.testing.assert_close(actual, output, rtol=0, atol=2 * rounding if backend is exact else 0.05)
        assert torch.equal(ours.keys, stock.keys)
        assert torch.equal(ours.values, stock.values)
        outcomes = {site.outcome for graph in backend.graphs for site in graph.sites}
        assert Outcome.REWRITTEN in outcomes
        assert outcomes <= {Outcome.REWRITTEN, Outcome.PREFILL}, "three rows after one: their number varies"
    assert len(built) == 1, "planes are made once, and follow every write"
    after = operations(few.graphs[0].module)
    assert after["quantize_on_write.default"] == after["aligned_read_attention.default"] == 1
    assert after["scaled_dot_product_attention"] == 0


@pytest.mark.parametrize("write", [by_index, by_index_and_ellipsis])
def test_positions_may_count_from_the_end(eager_backend, write: Write) -> None:
    """Planes know no such positions; what is written to them is the row of the cache that is meant."""

    class Counting(Layer):
        def forward(self, query, key, value, positions, start):
            negative = positions - ROWS
            self.write(self.keys, key, negative, start)
            self.write(self.values, value, negative, start)
            mask = torch.arange(ROWS) <= positions[:, None]
            return F.scaled_dot_product_attention(query, self.keys, self.values, attn_mask=mask[None, None], enable_gqa=True)

    expected = steps(Counting(write, prefix=False), [1] * 6)
    backend = eager_backend(2.0)
    actual = steps(torch.compile(Counting(write, prefix=False), backend=backend), [1] * 6)
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0.05)
    assert all(site.outcome is Outcome.REWRITTEN for graph in backend.graphs for site in graph.sites)


def test_the_first_rows_bound_what_is_read(harness, same_as_stock) -> None:
    """Nothing hides rows that were never written, but they are not read."""

    def layer(query, key, value, keys, values, start: int):
        keys[:, :, start : start + 1] = key
        values[:, :, start : start + 1] = value
        return F.scaled_dot_product_attention(query, keys[:, :, : start + 1], values[:, :, : start + 1])

    tensors = [torch.randn(1, HEADS, 1, DIM) for _ in range(3)]
    caches = [torch.full((1, HEADS, ROWS, DIM), 1e3) for _ in range(2)]
    for cache in caches:
        cache[:, :, :5] = torch.randn(1, HEADS, 5, DIM)
    same_as_stock(lambda *args: layer(*args, start=5), harness, *tensors, *caches)
    assert harness.outcomes == [Outcome.REWRITTEN]
    (read,) = (node for node in harness.last.module.graph.nodes if "aligned_read_attention" in str(node.target))
    assert read.kwargs["length"] == 6


def repeated(cache, rows, positions, _):
    cache[:, :, positions] = rows[:, :1]


def one_row_for_all(cache, rows, _, start):
    cache[:, :, start : start + 2] = rows


def every_other(cache, rows, _, start):
    cache[:, :, start : start + 2 * rows.shape[2] : 2] = rows


def counted_back(cache, rows, _, start):
    cache[:, :, start - ROWS : start - ROWS + rows.shape[2]] = rows


def one_head(cache, rows, positions, _):
    cache[:, :1, positions] = rows[:, :1]


def by_bool(cache, rows, positions, _):
    cache[:, :, torch.arange(ROWS) == positions] = rows


@pytest.mark.parametrize(
    ("write", "met"),
    [
        (repeated, "the rows written to K are repeated to its size"),
        (one_row_for_all, "where rows are written to K is not known"),
        (every_other, "K is also written by setitem"),
        (counted_back, "where rows are written to K is not known"),
        (one_head, "K is also written by setitem"),
        (by_bool, "the positions written to K are no 1-D int64 tensor"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_near_misses_stay_stock_s(harness, write: Write, met: str) -> None:
    expected = steps(Layer(write, prefix=False), [1] * 3)
    actual = steps(torch.compile(Layer(write, prefix=False), backend=harness), [1] * 3)
    for left, right in zip(actual, expected, strict=True):
        assert torch.equal(left, right)
    assert {reason for graph in harness.graphs for reason in (site.reason for site in graph.sites)} == {met}


def test_a_position_that_changes_in_between(harness, same_as_stock) -> None:
    def layer(query, key, value, keys, values, counter):
        keys[:, :, counter[:1]] = key
        counter.add_(1)
        values[:, :, counter[:1]] = value
        return F.scaled_dot_product_attention(query, keys, values)

    inputs = [torch.randn(1, HEADS, 1, DIM) for _ in range(3)]
    same_as_stock(layer, harness, *inputs, *(torch.zeros(1, HEADS, ROWS, DIM) for _ in range(2)), torch.tensor([3, 4]))
    assert harness.reasons == ["the new rows or their positions change between the writes of K and of V"]


def test_other_rows_of_v(harness, same_as_stock) -> None:
    def layer(query, key, value, keys, values):
        keys[:, :, 3:4] = key
        values[:, :, 4:5] = value
        return F.scaled_dot_product_attention(query, keys, values)

    inputs = [torch.randn(1, HEADS, 1, DIM) for _ in range(3)]
    same_as_stock(layer, harness, *inputs, *(torch.zeros(1, HEADS, ROWS, DIM) for _ in range(2)))
    assert harness.reasons == ["K and V are written at different positions"]


def test_a_part_of_the_rows_that_does_not_begin_with_the_first(harness, same_as_stock) -> None:
    def layer(query, key, value, keys, values):
        keys[:, :, 3:4] = key
        values[:, :, 3:4] = value
        return F.scaled_dot_product_attention(query, keys[:, :, 1:], values[:, :, 1:])

    inputs = [torch.randn(1, HEADS, 1, DIM) for _ in range(3)]
    same_as_stock(layer, harness, *inputs, *(torch.zeros(1, HEADS, ROWS, DIM) for _ in range(2)))
    assert harness.reasons == ["attention reads a part of the cache (getitem before it)"]
