"""The certificate: a bound on the error of a read that holds for every input, in sympy.

Unlike :mod:`.precision`, nothing here is a mean over independent errors. Every rounding error is replaced by its largest
possible value and all are added up linearly, so that the sum bounds the actual error however the numbers in the cache were
chosen. Derivation in docs/formulas.md. Symbols, beside those of :mod:`.precision` (``b``, ``p``, ``s_K``, ``s_V``, ``D``,
``R``, ``v``, ``alpha``, ``u``):

* ``q_1``: 1-norm of the query of the score pass, the sum of its int8 terms, times the softmax scale; ``l_1``: the same of its
  second term alone; ``r_1``: the same of what the query has lost by rounding to both;
* ``D_K``: head dimension of K;
* ``d``: bound on the error of one row's score; ``g``: :data:`growth` of it;
* ``m``: norm of the mean that stands in for a V row;
* ``x``: distance of a row's score from the largest;
* ``V``: bound on what V's errors add to the output; ``W``: sum of :data:`weight_error_bound` over the rows; ``W_v``: the same
  sum with each row's weight times its norm ``v``; ``A``: sum of ``p e^-d``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import sympy

from .precision import D, R, alpha, b, p, s_K, s_V, u, v

q_1, l_1, r_1, D_K, d, g, m, x, V, W, W_v, A = sympy.symbols("q_1 l_1 r_1 D_K d g m x V W W_v A", positive=True)

UNIT = sympy.Rational(1, 2**24)
"""Unit roundoff of float32, in which planes are written and the query is mixed."""

CODE_SLACK = sympy.Rational(1, 2**20)
"""Rounding of a code's own arithmetic in float32, in units of the row's scale: 1/32 of a 16-bit code."""

NORM_SLACK = 1 + sympy.Rational(1, 60)
"""Norms of V rows are stored within 1/64; the rest is for the sums of squares in float32."""

mixing_slack = (sympy.log(D_K, 2) + 1) * sympy.sqrt(D_K) * UNIT
"""Rounding of the Hadamard transform in float32, in units of the row's scale: each of ``log2 D_K`` stages and the last factor
round every element by at most ``UNIT`` times the row's norm, which is at most ``sqrt(D_K)`` times its largest element."""

key_slack = CODE_SLACK + mixing_slack
"""Everything that float32 adds to the error of a K row, in units of its scale."""

MID_REACH = sympy.Rational(15, 256)
"""Largest value of a mid nibble, 7.5 steps, in units of the row's scale."""

score_bound = s_K * (
    q_1 * (2**-b + key_slack)
    + r_1 * (sympy.Rational(15, 16) + key_slack)
    + sympy.Piecewise((l_1 * MID_REACH, sympy.Eq(b, 8)), (0, True))
)
"""``d``: the int8 query times the key's error, at most half a step in every element, and the query's error times the key, whose
elements are at most 15/16 of the scale. At 8 bits also what the mid plane leaves out: it is multiplied by the first term
only."""

value_bound = s_V * sympy.sqrt(D) * (2**-b + CODE_SLACK)
"""Norm of the error of a V row read at ``b`` bits: half a step in every element."""

skipped_value_bound = v * NORM_SLACK + m
"""Norm of the error of a V row that a mean stands in for."""

growth = d * (1 + d * sympy.exp(d) / 2)
"""At least ``e^d - 1``, by Taylor's theorem, and without its cancellation where ``d`` is small."""

weight_error_bound = p * g
"""A row's weight, computed from a score that is off by at most ``d``, before the weights are normalised."""

weight_least = p * sympy.exp(-d)
"""What that weight is at least: the addend of ``A``."""

key_addend = p * g * (v * NORM_SLACK + R)
"""What leaving a K row at its bits adds to the certificate, but for ``A`` and ``V``: what the policy holds against a
threshold."""

certificate = V + (W_v * NORM_SLACK + W * (R + V)) / A
"""Bound on the norm of the output's error; ``R`` is the norm of the output as computed.

With ``o' = sum p v`` for the read weights and exact V, and ``r = e^(s - s')`` the exact weight over the read one, the exact
output is ``o = o' + sum p (r - 1) (v - o') / sum p r``, because ``sum p (v - o') = 0``. So ``||o - o'|| <= sum p (e^d - 1) (v
+ ||o'||) / sum p e^-d``, and ``o'`` itself is within ``V`` of the output as computed."""

weight_slack = 2 * UNIT * (4 + x)
"""Added to ``d`` where weights are float32 (generated code): the exponential's relative error, below 4 units, and the rounding
of its argument, both doubled."""

VALUE_TILE = 16
"""V rows whose weighted sum is a float32 in generated code; sums of such sums are doubles."""

SUM_SLACK = 2 * VALUE_TILE * UNIT
"""What those float32 sums lose, in units of ``sum p ||v||``, doubled."""

FLOAT_SLACK = sympy.Rational(1, 2**16)
"""Relative error of the certificate's own sums in generated code: float32 over a block of 128 rows, doubles over blocks, and
``e^d`` of a rounded ``d`` up to :data:`LARGEST_SCORE_BOUND`."""

worst_case_budget = alpha * u * R
"""The certificate that ``tolerance`` allows: rounding the output to its dtype makes an error of at most ``u R``."""

WORST_CASE: Mapping[str, sympy.Expr] = {
    "score_bound": score_bound,
    "value_bound": value_bound,
    "skipped_value_bound": skipped_value_bound,
    "growth": growth,
    "weight_error_bound": weight_error_bound,
    "weight_least": weight_least,
    "weight_slack": weight_slack,
    "key_addend": key_addend,
    "certificate": certificate,
    "worst_case_budget": worst_case_budget,
}
"""Every named formula of the certified read."""

SHARES: Mapping[str, float] = {"skip": 1 / 8, "key": 3 / 8, "accepted_key": 1 / 2, "value": 1 / 4}
"""How the certified read divides its budget. Rows of K are chosen so that the others keep to ``key``; weights change when they
are read, and no more are read while all keep to ``accepted_key``. The rest is for what none of the thresholds see. Only the
bytes depend on this division: the certificate is computed from what was read."""

LADDER = 14
"""Thresholds that are tried when rows are chosen, each half of the one before. The first is the limit on the sum of what the
rows left cost. Where none is small enough it is the limit over the number of rows, which keeps to the limit whatever they
hold."""

REFINEMENTS = 3
"""How often rows of K may be chosen anew after the weights have changed."""

SMALLEST_SCALE = 2.0**-100
"""Rows of a smaller scale, but for zeros, are not certified: 32768 / scale, by which they were written, nears float32's end."""

FINEST_BUDGET = 2.0**-16
"""Below this ``tolerance`` times unit roundoff everything is read at once: generated code could not certify less, because of
:data:`SUM_SLACK` and :data:`weight_slack`."""

LARGEST_SCORE_BOUND = 80.0
"""Above it ``d`` counts as infinite, since ``e^d`` leaves float32: such a row is read further, or the head in full. Likewise
weights above ``e`` to this, of scores that reading further has raised far above the first largest."""


def query_slack(dimension: int) -> float:
    """What mixing the query in float32 adds to ``r_1``, in units of the query's norm."""
    return float(mixing_slack.subs(D_K, dimension)) * math.sqrt(dimension)
