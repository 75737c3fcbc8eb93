"""Arguments that are parts of larger tensors in compiled code, as K and V of a fused QKV projection are."""

from __future__ import annotations

import torch
from cases import keyed_caches, relative_errors

from alignedkv_compile import lowering, ops
from alignedkv_compile.layout import arena_layout
from alignedkv_compile.plane_builder import PLANE_BUILDER

HEADS, ROWS, DIM = 2, 300, 64


def _fused(projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, K and V ``[1, H, S, D]`` of a projection ``[1, S, 3 * H * D]``."""
    query, key, value = projected.view(1, -1, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind()
    return query, key, value


def test_rows_of_one_projection_are_written_from_where_they_start() -> None:
    projected = torch.randn(1, ROWS, 3 * HEADS * DIM, generator=torch.Generator().manual_seed(0)).bfloat16()
    _, key, value = _fused(projected)
    eager = torch.zeros(arena_layout(key, value).total, dtype=torch.uint8)
    compiled = eager.clone()
    positions = torch.arange(ROWS)
    ops.quantize_on_write(eager, key, value, positions, ROWS)

    def write(planes: torch.Tensor, rows: torch.Tensor) -> None:
        _, new_key, new_value = _fused(rows * 2)
        ops.quantize_on_write(planes, new_key, new_value, positions, ROWS)

    lowering.register()
    with keyed_caches():
        torch.compile(write, fullgraph=True)(compiled, projected / 2)
    assert torch.equal(compiled, eager)


def test_a_query_and_a_mask_that_are_slices_are_read_from_where_they_start() -> None:
    generator = torch.Generator().manual_seed(1)
    key, value = (torch.randn(1, HEADS, ROWS, DIM, generator=generator) for _ in range(2))
    projected = torch.randn(1, 1, 3 * HEADS * DIM, generator=generator)
    masks = torch.rand(3, 1, 1, ROWS, generator=generator) < 0.5
    planes = torch.zeros(arena_layout(key, value).total, dtype=torch.uint8)
    PLANE_BUILDER.rebuild(planes, key, value, ROWS)

    def read(planes: torch.Tensor, projected: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        query = _fused(projected.flip(-1))[1]
        mask = masks.logical_not()[2:]
        return ops.aligned_read_attention(query, key, value, planes, mask, None, ROWS, DIM**-0.5, 0.0, 2.0, 2.0**-11, 1)

    lowering.register()
    with keyed_caches():
        output = torch.compile(read, fullgraph=True)(planes, projected, masks)
    query = _fused(projected.flip(-1))[1]
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, masks.logical_not()[2:])
    assert relative_errors(output, expected.double()).max() < 0.01
