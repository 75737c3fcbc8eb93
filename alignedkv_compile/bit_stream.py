"""Numbers of few bits one behind another in bytes, each from its lowest bit on: eager torch, for formats that kernels read."""

from __future__ import annotations

import torch


def packed_bits(numbers: torch.Tensor, bits: torch.Tensor, size: int) -> torch.Tensor:
    """Rows of numbers as bytes.

    Args:
        numbers: int64 ``[..., N]``, not negative.
        bits: int64 ``[..., N]``: how many bits each takes; all of a row fit into its bytes.
        size: bytes of a row.

    Returns:
        uint8 ``[..., size]``, zero behind the last number.
    """
    spread = torch.zeros(*bits.shape[:-1], size * 8 + 1, dtype=torch.uint8, device=bits.device)  # the last takes what is no bit
    starts = bits.cumsum(-1) - bits
    for bit in range(int(bits.max()) if bits.numel() else 0):
        place = torch.where(bit < bits, starts + bit, size * 8)
        spread.scatter_(-1, place, (numbers >> bit & 1).to(torch.uint8))
    weights = 1 << torch.arange(8, device=bits.device)
    return (spread[..., :-1].unflatten(-1, (size, 8)).to(torch.int64) * weights).sum(-1).to(torch.uint8)


def unpacked_bits(data: torch.Tensor, bits: torch.Tensor, start: torch.Tensor | int) -> torch.Tensor:
    """Inverse of :func:`packed_bits`: int64, shaped like ``bits``.

    Args:
        data: uint8 ``[..., size]``.
        bits: int64 ``[..., N]``.
        start: the bit where each row's numbers start, int64 ``[...]`` or one for all. What would lie behind a row's end is
            unspecified.
    """
    spread = (data[..., None] >> torch.arange(8, device=data.device, dtype=torch.uint8) & 1).flatten(-2)
    starts = bits.cumsum(-1) - bits + (start[..., None] if isinstance(start, torch.Tensor) else start)
    numbers = torch.zeros_like(bits)
    for bit in range(int(bits.max()) if bits.numel() else 0):
        place = (starts + bit).clamp_max(spread.shape[-1] - 1)
        numbers += torch.where(bit < bits, spread.gather(-1, place).to(torch.int64) << bit, 0)
    return numbers
