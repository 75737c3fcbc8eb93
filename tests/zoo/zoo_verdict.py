"""When a result is wrong: the error model.

The truth is the same model with the same weights in float64. Stock eager, in the dtype in question, errs by some amount, which
rounding at every operation of the model explains; another order of the same operations errs by another draw of about the
same size. With ``tolerance=2`` attention rounds about as often as stock's 16-bit attention does, by the option's definition.
So the largest error over all logits of all steps may be

    limit = 3 * (stock's largest error) + 4 * u * (largest logit)

where ``u`` is the unit roundoff of the model's dtype:
3 for the scatter between two draws, and the second term for those logits that stock
happens to hit exactly. Each tensor of the cache is judged in the same way at the end.

A model that amplifies roundings may give stock a lucky draw: Gemma 3n in fp32, whose sparse activations cut at a quantile, errs
by 4e-6 eagerly and by 1.2e-5 under ``torch.compile(backend="eager")`` (looked at once). So where the limit is exceeded, that
second draw of stock is made too, and the larger of both errors counts. A wrong row of the cache is orders of magnitude off in
fp32.

Some models cannot run in float64. Then the truth for bf16 is fp32, and for fp32 it is stock itself, whose error is taken to be
``16 * u * (largest logit)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from zoo_decode import Decoded

SCATTER = 3.0
ROUNDINGS = 4.0
UNKNOWN_ERROR = 16.0
UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


@dataclass(frozen=True)
class Judgement:
    """How far a result is from the truth.

    Attributes:
        error: the largest error as a multiple of its limit; above 1 is wrong.
        where: what has that error.
    """

    error: float
    where: str

    @property
    def right(self) -> bool:
        """Not a number is wrong."""
        return self.error <= 1.0


def judge(
    actual: Decoded, stock: Decoded, truth: Decoded | None, dtype: torch.dtype, again: Decoded | None = None
) -> Judgement:
    """Compare a result with stock's and the truth; without a truth, stock's own result is taken for it.

    ``dtype`` is the model's: logits and states may be fp32 in a bf16 model, but are no more exact for that. ``again`` is
    stock's result by another order of operations, where there is one.
    """
    roundoff = UNIT_ROUNDOFF[dtype]
    missing = sorted(set(stock.cache) ^ set(actual.cache))
    if missing:
        return Judgement(float("inf"), f"{missing[0]}: in one cache only")
    draws = [stock] if again is None else [stock, again]
    true: Sequence[torch.Tensor] | None = None if truth is None else truth.logits
    judgements = [_judge_tensors("logits", actual.logits, [draw.logits for draw in draws], true, roundoff)]
    for name in stock.cache:
        true = None if truth is None or name not in truth.cache else (truth.cache[name],)
        judgements.append(_judge_tensors(name, (actual.cache[name],), [(draw.cache[name],) for draw in draws], true, roundoff))
    return max(judgements, key=lambda one: (one.error != one.error, one.error))


def _judge_tensors(
    name: str,
    actual: Sequence[torch.Tensor],
    draws: Sequence[Sequence[torch.Tensor]],
    truth: Sequence[torch.Tensor] | None,
    roundoff: float,
) -> Judgement:
    stock = draws[0]
    if [one.shape for one in actual] != [one.shape for one in stock]:
        return Judgement(float("inf"), f"{name}: shape {tuple(actual[0].shape)}, not {tuple(stock[0].shape)}")
    if not stock[0].numel():
        return Judgement(0.0, name)
    if not stock[0].is_floating_point():
        equal = all(torch.equal(left, right) for left, right in zip(actual, stock, strict=True))
        return Judgement(0.0 if equal else float("inf"), name)
    scale = max(float(step.double().abs().max()) for step in (truth or stock))
    stock_error = UNKNOWN_ERROR * roundoff * scale if truth is None else max(_distance(draw, truth) for draw in draws)
    limit = SCATTER * stock_error + ROUNDINGS * roundoff * scale
    error = _distance(actual, truth or stock)
    return Judgement(error / limit if limit else 0.0 if error == 0 else float("inf"), name)


def _distance(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    """Largest difference; NaN where only one of the two has a number."""
    differences = []
    for a, b in zip(left, right, strict=True):
        same = (a == b) | (a.isnan() & b.isnan())
        differences.append(torch.where(same, 0.0, (a.double() - b.double()).abs()).max())
    return float(torch.stack(differences).max())
