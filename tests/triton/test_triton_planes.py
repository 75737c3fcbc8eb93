"""The write as Triton, in the interpreter: the bits that the reference stores, in the order that a GPU wants."""

from __future__ import annotations

import pytest
import torch
from cases import hard_rows, make_case, write_planes
from triton_cases import row_ordered_planes, to_row_order, write_triton
from triton_checks import assert_same_planes

from alignedkv_compile.arena import arena_views
from alignedkv_compile.layout import BLOCK_ROWS, arena_layout

SHAPES = [(64, 64, torch.bfloat16), (80, 48, torch.float16), (128, 128, torch.float32), (21, 9, torch.bfloat16)]


@pytest.mark.parametrize(("key_dim", "value_dim", "dtype"), SHAPES)
def test_triton_writes_the_bits_of_the_reference(key_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    case = make_case(batch=2, rows=300, key_dim=key_dim, value_dim=value_dim, dtype=dtype)
    hard_rows(case)
    expected = row_ordered_planes(case)
    written = torch.zeros_like(expected)
    write_triton(written, case.key, case.value, torch.arange(300), 300)
    assert_same_planes(case, expected, written)


@pytest.mark.parametrize("order", ["one by one", "chunks", "shuffled", "rewritten", "beyond the capacity"])
def test_order_of_writes_changes_no_plane_and_never_a_wrong_sum(order: str) -> None:
    case = make_case(rows=BLOCK_ROWS + 40, heads=1)
    rows = case.key.shape[2]
    layout = arena_layout(case.key, case.value)
    chunks = {
        "one by one": [list(range(125)), *([i] for i in range(125, 131)), list(range(131, rows))],
        "chunks": [list(range(i, min(i + 50, rows))) for i in range(0, rows, 50)],
        "shuffled": [torch.randperm(rows, generator=torch.Generator().manual_seed(1)).tolist()],
        "rewritten": [list(range(rows)), [BLOCK_ROWS + 3], list(range(BLOCK_ROWS))],
        "beyond the capacity": [list(range(rows)), [-1, 0, 1], [rows, rows + 1], [1 << 40]],
    }[order]
    expected = write_planes(case)
    written = torch.zeros_like(expected)
    views = arena_views(written, layout)
    for chunk in chunks:
        index = torch.tensor(chunk)
        source = index.clamp(0, rows - 1)
        write_triton(written, case.key[:, :, source], case.value[:, :, source], index, rows)
    whole = arena_views(to_row_order(expected, layout), layout)
    for name in ("key_hi", "key_mid", "value_hi", "value_mid", "scales"):
        assert torch.equal(getattr(whole, name), getattr(views, name)), name
    totals = torch.stack([case.value[0, 0, :BLOCK_ROWS].float().sum(0), case.value[0, 0, BLOCK_ROWS:].float().sum(0)])
    usable = views.value_count[0] == torch.tensor([BLOCK_ROWS, 40])
    torch.testing.assert_close(views.value_sum[0][usable], totals[usable], rtol=1e-4, atol=1e-3)
    complete = {"shuffled": [-1, -1], "rewritten": [BLOCK_ROWS, -1], "beyond the capacity": [2, 40]}
    assert views.value_count[0].tolist() == complete.get(order, [BLOCK_ROWS, 40])
