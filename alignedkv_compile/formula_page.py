"""docs/formulas.md, generated from the sympy expressions that the reference evaluates and the kernels print: ``make docs``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import sympy

from .precision import EXPRESSIONS, KAPPA, LARGEST_NORM_RATIO, LARGEST_SHIFT, NORM_RANGE, STREAM_FRACTION, TERM_RATIO
from .worst_case import CODE_SLACK, NORM_SLACK, SHARES, WORST_CASE, mixing_slack

PAPER = "AlignedKV, arXiv 2409.16546"

SYMBOLS: Mapping[str, tuple[str, str]] = {
    "alpha": ("the option `tolerance`", "1"),
    "u": ("unit roundoff of the dtype that the tolerance is measured in: 2⁻⁸ bf16, 2⁻¹¹ fp16, 2⁻²⁴ fp32", "1"),
    "R": ("norm of the attention output of one query row", "value"),
    "B": ("allowed added rms error", "value"),
    "E": ("sum of all addends' errors at 8 bits", "value"),
    "N": ("live rows", "rows"),
    "n": ("root mean square of the V rows' norms", "value"),
    "p": ("softmax weight of a row", "1"),
    "v": ("norm of a V row, stored within 1/64", "value"),
    "s_K": ("stored scale of a mixed K row: 16/15 of its largest element, rounded up by at most 1/16", "key"),
    "s_V": ("stored scale of a V row, likewise", "value"),
    "q": ("norm of the query row times the softmax scale", "1/key"),
    "D": ("head dimension of V", "elements"),
    "b": ("bits read of a row: 4 or 8", "bits"),
    "x": ("variance of a score; in the certificate the distance of a score from the largest", "1"),
    "left": ("sum of squared errors that K rows left at 4 bits make", "value²"),
    "P_v": ("sum of p v", "value"),
    "P_sK": ("sum of p s_K", "key"),
    "P_sKv": ("sum of p s_K v", "key value"),
    "P_sV": ("sum of p s_V", "value"),
    "row": ("one row in the cache", "bytes"),
    "plane": ("one row of a 4-bit plane", "bytes"),
    "theta_4": ("theta over the mid ratio of V: what addends of V at 4 bits are held to", "value"),
    "rows_K8": ("rows of K of which the second 4 bits are read", "rows"),
    "rows_K": ("rows of K that are read in full", "rows"),
    "rows_V4": ("rows of V of which the first 4 bits are read", "rows"),
    "rows_V8": ("rows of V of which the second 4 bits are read", "rows"),
    "rows_V": ("rows of V that are read in full", "rows"),
    "row_K": ("one K row in the cache", "bytes"),
    "row_V": ("one V row in the cache", "bytes"),
    "plane_K": ("one K row of a 4-bit plane", "bytes"),
    "plane_V": ("one V row of a 4-bit plane", "bytes"),
    "q_1": ("1-norm of the query as the sum of its int8 terms, times the softmax scale", "1/key"),
    "l_1": ("the same of its second term alone", "1/key"),
    "r_1": ("the same of what both terms have lost", "1/key"),
    "D_K": ("head dimension of K", "elements"),
    "d": ("bound on the error of a row's score", "1"),
    "g": ("growth of d", "1"),
    "m": ("norm of the block mean that stands in for a V row", "value"),
    "V": ("bound on what V's errors add to the output", "value"),
    "W": ("sum of p g", "1"),
    "W_v": ("sum of p g v", "value"),
    "A": ("sum of p e^-d", "1"),
}
"""Meaning and unit of every symbol; *key* and *value* are the units of the numbers in the two caches."""

NOTES: Mapping[str, tuple[str, str]] = {
    "budget": ("Allowed added error: alpha times the rms error of rounding the output, kappa u R.", "this project"),
    "weight_error_factor": (
        "A score error of variance x multiplies the weight by e^δ; its mean square error is x p² times this, the series of "
        "(e^{2x} - 2 e^{x/2} + 1) / x.",
        "this project",
    ),
    "key_coefficient": ("Error that a K row at b bits adds to the output, over p s_K sqrt(v² + R²).", f"{PAPER}, for addends"),
    "value_coefficient": ("Error that a V row at b bits adds to the output, over p s_V.", f"{PAPER}, for addends"),
    "addend_sum": (
        "E, with every row at 8 bits. Empirical: rows that stay at 4 bits enter with their 8-bit error.",
        "this project",
    ),
    "threshold": (
        "theta: every addend is held to it. Independent errors at or below it have a sum of squares of at most "
        "min(theta E, 2 N theta²) ≤ B².",
        f"{PAPER}: equal absolute precision",
    ),
    "mid_ratio": (
        "A mid plane is read where the error at 4 bits exceeds theta over this: it costs fewer bytes than the row itself.",
        "this project",
    ),
    "remaining_budget": ("B after K rows left at 4 bits have spent their part.", "this project"),
    "skip_threshold": ("tau: a V row with p max(v, n) ≤ tau is answered by its block's mean.", "this project"),
    "predicted_bytes": ("Bytes to be read after the score pass.", "this project"),
    "score_bound": ("d: largest error of a score whose K row is read at b bits.", "this project"),
    "value_bound": ("Largest norm of the error of a V row read at b bits.", "this project"),
    "skipped_value_bound": ("Largest norm of the error of a V row that a mean stands in for.", "this project"),
    "growth": ("g: at least e^d - 1, by Taylor's theorem; a weight is off by at most this factor.", "this project"),
    "weight_error_bound": ("Largest error of a weight before the weights are normalised.", "this project"),
    "weight_least": ("What a weight is at least: an addend of A.", "this project"),
    "weight_slack": (
        "Added to d in generated code, where weights are float32: the error of the exponential and of its argument, doubled.",
        "this project",
    ),
    "key_addend": ("What leaving a K row at its bits adds to the certificate.", "this project"),
    "certificate": ("Bound on the norm of the output's error.", "this project"),
    "worst_case_budget": (
        "The certificate that tolerance allows: alpha times the largest rounding error of the output.",
        "this project",
    ),
}
"""What every named formula is, and where its idea comes from."""

_DERIVATION = """Let `o'` be the sum with the weights as read and exact V, and `r_j = e^(s_j - s'_j)` a row's exact weight
over the read one, before normalisation. Then the exact output is

    o = o' + sum_j p_j (r_j - 1) (v_j - o') / sum_j p_j r_j,

because `sum p_j (v_j - o') = 0`. With `|s_j - s'_j| <= d_j` follows `|r_j - 1| <= e^(d_j) - 1` and `sum p r >= A`, hence
`||o - o'|| <= (W_v + W ||o'||) / A`. The output as computed lies within `V` of `o'`, so `||o'|| <= R + V`. All sums are
linear: no independence is assumed, and the bound holds for every content of the cache. It is computed after reading, from the
weights and bits in the end; where it exceeds the budget, or anything is not finite, all bits are read."""


_HEAD = """# Formulas

Generated by `make docs` from `alignedkv_compile/precision.py` and `alignedkv_compile/worst_case.py`; do not edit. The
reference evaluates these expressions, and they are printed into the generated kernels. [policy.md](policy.md) explains the
steps of the read policy.

## Symbols

| symbol | meaning | unit |
|---|---|---|"""


def render() -> str:
    """The page's text.

    Raises:
        KeyError: a formula or symbol has no entry in :data:`NOTES` or :data:`SYMBOLS`.
    """
    used = {str(s) for e in (*EXPRESSIONS.values(), *WORST_CASE.values()) for s in e.free_symbols}
    missing = used - set(SYMBOLS)
    if missing:
        raise KeyError(f"no meaning and unit for {sorted(missing)}")
    lines = [_HEAD]
    for name, (text, unit) in SYMBOLS.items():
        if name in used:
            lines.append(f"| ${sympy.latex(sympy.Symbol(name))}$ | {text} | {unit} |")
    constants = (
        ("kappa", "rms rounding error over u times the magnitude, mantissa log-uniform in [1, 2)", KAPPA),
        ("term ratio", "step of the query's first int8 term over that of its second", TERM_RATIO),
        ("stream fraction", "above this share of the cache's bytes, the cache is streamed", STREAM_FRACTION),
        ("largest shift", "change of a sum of weights by K's mid planes beyond which the cache is streamed", LARGEST_SHIFT),
        ("largest norm ratio", "R over the norm found, beyond which rows are chosen again or streamed", LARGEST_NORM_RATIO),
        ("norm range", "rms norm of V outside of which the cache is streamed", NORM_RANGE),
    )
    lines += ["", "## Constants", "", "| name | meaning | value |", "|---|---|---|"]
    lines += [f"| {name} | {text} | ${sympy.latex(sympy.sympify(value))}$ |" for name, text, value in constants]
    lines += ["", "## The error model and the read policy", ""]
    lines += _formulas(EXPRESSIONS)
    lines += ["## The certificate", "", _DERIVATION, ""]
    code, mixing, norm = (sympy.latex(slack) for slack in (CODE_SLACK, mixing_slack, NORM_SLACK))
    shares = ", ".join(f"{name} {share:g}" for name, share in SHARES.items())
    lines += [
        f"Slack for float32, in units of a row's scale: a code ${code}$, mixing ${mixing}$. Slack of stored V norms: ${norm}$.",
        f"Shares of the budget by which rows are chosen: {shares}.",
        "",
    ]
    lines += _formulas(WORST_CASE)
    return "\n".join(lines).rstrip() + "\n"


def _formulas(expressions: Mapping[str, sympy.Expr]) -> list[str]:
    lines = []
    for name, expression in expressions.items():
        text, source = NOTES[name]
        lines += [f"**`{name}`** {text} Source: {source}.", "", "$$", sympy.latex(expression), "$$", ""]
    return lines


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")
