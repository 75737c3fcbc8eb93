"""The query of the aligned read's score pass in the reference: int8 terms, and their products with the planes of K."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .layout import CODE_RANGE, HI_STEP, MID_STEP, NIBBLE_CENTER
from .precision import INT8_MAX, QUERY_TERMS, TERM_RATIO


@dataclass(frozen=True)
class Int8Query:
    """Hadamard-mixed query rows ``[M, Dk]`` as ``step * (terms[0] + terms[1] / TERM_RATIO)``.

    ``step`` is float32 ``[M, 1]``; ``terms`` are two tensors ``[M, Dk]`` of whole numbers in [-127, 127], in float32.
    """

    step: torch.Tensor
    terms: list[torch.Tensor]

    @classmethod
    def rounded(cls, mixed: torch.Tensor) -> Int8Query:
        """``mixed`` rounded to terms, of which each but the first is what the one before has lost."""
        step = mixed.abs().amax(-1, keepdim=True) / INT8_MAX
        left, terms = torch.where(step > 0, mixed / step, 0.0), []
        for _ in range(QUERY_TERMS):
            terms.append(torch.round(left))
            left = (left - terms[-1]) * TERM_RATIO
        return cls(step, terms)

    def hi_scores(self, hi: torch.Tensor, offset: torch.Tensor, key_scale: torch.Tensor, scale: float) -> torch.Tensor:
        """Scores ``[M, T]`` from the nibbles ``[T, Dk]`` of the 4-bit plane, less the rows' dither, by every term."""
        dots = torch.zeros((), device=hi.device)
        for place, term in enumerate(self.terms):
            dots = dots + (term @ hi.T + term.sum(-1, keepdim=True) * (-NIBBLE_CENTER - offset)) / TERM_RATIO**place
        return dots * (self.step * scale * HI_STEP / CODE_RANGE) * key_scale

    def mid_scores(self, mid: torch.Tensor, key_scale: torch.Tensor, scale: float, terms: int = 1) -> torch.Tensor:
        """What the nibbles of the mid plane add to them, by the first ``terms`` terms."""
        query = sum(term / TERM_RATIO**place for place, term in enumerate(self.terms[:terms]))
        return (query * self.step) @ (mid - NIBBLE_CENTER).T * (scale * MID_STEP / CODE_RANGE) * key_scale
