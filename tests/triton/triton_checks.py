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
    (*scales, norm), (*written_scales, written_norm) = (arena.unpack_scales(views.scales[:, :count]) for views in (left, right))
    rows = torch.isfinite(sum(scales))
    for name in ("key_hi_rows", "key_mid", "value_hi", "value_mid"):
        assert torch.equal(getattr(left, name)[:, :count][rows], getattr(right, name)[:, :count][rows]), name
    for expected_scale, scale in zip(scales, written_scales, strict=True):
        assert torch.equal(scale[rows], expected_scale[rows])
    torch.testing.assert_close(written_norm[rows], norm[rows], rtol=2**-5, atol=0)
    assert torch.equal(left.value_count, right.value_count)
    usable = left.value_count > 0
    largest = float(left.value_sum[usable].abs().max())
    torch.testing.assert_close(left.value_sum[usable], right.value_sum[usable], rtol=1e-6, atol=1e-6 * max(largest, 1.0))
    assert not torch.isfinite(sum(written_scales))[~rows].any()
