"""What the Triton tests assert of planes and counters."""

from __future__ import annotations

import torch
from cases import Case

from alignedkv_compile import arena
from alignedkv_compile.arena import arena_views
from alignedkv_compile.layout import arena_layout


def assert_same_planes(case: Case, expected: torch.Tensor, written: torch.Tensor) -> None:
    """Two arenas in row order hold the same rows; norms and sums may round another way, and rows with NaN or Inf say only
    that."""
    count = case.key.shape[2]
    layout = arena_layout(case.key, case.value)
    left, right = arena_views(expected, layout), arena_views(written, layout)
    finite = torch.isfinite(left.key_scale) & torch.isfinite(arena.unpack_value_scale(left.value_scale)[0])
    rows = finite[:, :count]
    for name in ("key_hi_rows", "key_mid", "value_hi", "value_mid", "key_scale"):
        assert torch.equal(getattr(left, name)[:, :count][rows], getattr(right, name)[:, :count][rows]), name
    scales, norms = zip(*(arena.unpack_value_scale(views.value_scale[:, :count][rows]) for views in (left, right)), strict=True)
    assert torch.equal(*scales)
    torch.testing.assert_close(norms[0], norms[1], rtol=2**-7, atol=0)
    assert torch.equal(left.value_count, right.value_count)
    usable = left.value_count > 0
    largest = float(left.value_sum[usable].abs().max())
    torch.testing.assert_close(left.value_sum[usable], right.value_sum[usable], rtol=1e-6, atol=1e-6 * max(largest, 1.0))
    special = ~finite[:, :count]
    kept = right.key_scale[:, :count] + arena.unpack_value_scale(right.value_scale[:, :count])[0]
    assert not torch.isfinite(kept)[special].any()
