"""The error model and the read policy: every formula once, in sympy.

The reference evaluates these expressions through :func:`evaluate`; generated code gets them through
:func:`print_cpp_function` and :func:`print_triton_function`. The principle is AlignedKV's (arXiv 2409.16546),
docs/policy.md explains it: an addend of the attention sum is one cache row's contribution, and it is read at the fewest
bits whose rounding error stays below a threshold ``theta``, the same for all.

Symbols (all positive):

* ``alpha``: tolerance, the allowed added rms error in units of the output's own rounding error;
* ``u``: unit roundoff of the dtype that the tolerance is measured in;
* ``R``: norm of the attention output (estimated while reading);
* ``p``: softmax weight of a row; ``s_K``, ``s_V``: stored scales of its K and V row (``absmax * 16/15``);
* ``v``: norm of its V row; ``n``: rms of ``v`` over the live rows; ``N``: number of live rows;
* ``q``: norm of the query row times the softmax scale; ``D``: head dimension of V; ``b``: bits read, 4 or 8;
* ``row``, ``plane``: bytes of a row of the cache and of one of its 4-bit planes;
* ``theta_4``: what addends of V at 4 bits are held to.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import sympy
from sympy.codegen.ast import float32, real
from sympy.printing.str import StrPrinter

from .layout import ArenaLayout

alpha, u, R, N, n, D, q, s_K, s_V, p, v, b = sympy.symbols("alpha u R N n D q s_K s_V p v b", positive=True)
B, E, left, row, plane, theta_4 = sympy.symbols("B E left row plane theta_4", positive=True)
P_v, P_sK, P_sKv, P_sV = sympy.symbols("P_v P_sK P_sKv P_sV", positive=True)
rows_K8, rows_K, rows_V4, rows_V8, rows_V, row_K, row_V, plane_K, plane_V = sympy.symbols(
    "rows_K8 rows_K rows_V4 rows_V8 rows_V row_K row_V plane_K plane_V", positive=True
)

KAPPA = sympy.sqrt(1 / (8 * sympy.log(2)))
"""rms of a rounding error over ``u`` times the number's magnitude, for a mantissa that is log-uniform in [1, 2)."""

INT8_MAX = 127
"""Largest magnitude of an int8 that stands for the query, or in C++ for a weight."""

TERM_RATIO = 2 * INT8_MAX
"""Step of the query's first int8 term over that of its second: half a step of the first is 127 steps of the second."""

QUERY_TERMS = 2
"""int8 terms that stand for the query in the score pass.

The rounding error of one alone has about the variance of the 8-bit key's error. It would send rows to full reads, which cost
more than a second product with a plane that is loaded anyway. Two terms round 254 times as finely. What remains is that the
mid plane is multiplied by the first term only, which leaves out its rounding error times a part of K of at most ``s_K /
16``: an element of variance ``step^2 / 12`` times one of ``s_K^2 / 768``. That is ``(largest / rms element of the mixed
query)^2 / 756`` of the 8-bit key's own variance, about 1/100, and is left out of the error model."""

STREAM_FRACTION = sympy.Rational(9, 10)
"""When the predicted bytes exceed this fraction of the cache's own, the cache is streamed in full instead."""

LARGEST_SHIFT = 8
"""Factor by which the mid planes of K may change the sum of a query row's weights. Beyond it the weights that chose the rows
were wrong, by a row of large norm that 4 bits misread, and the cache is streamed. Chosen, not derived: at 4 it would stream
heads of peaked attention whose promise is kept anyway."""

LARGEST_NORM_RATIO = 2
"""Factor by which the output may turn out smaller than its norm ``R``, which is estimated before V is read. Beyond it the
thresholds were too large by more than that, and CPUs choose rows once more; a second time, and on GPUs, the cache is streamed.
Chosen, not derived."""

SMALLEST_SUM = 1e-30
"""Sums that something is divided by (of errors, of weights) count as no less, and weights below it as none: V's norms are above
:data:`NORM_RANGE` in the mean, and 127 over this is a float32."""

STEPS = 1024
"""Steps of a GPU's stored scores per power of two: an int16 is off by at most half a step, a weight by 0.034 %."""

LARGEST_STEP = 32767
"""Largest stored score, 32 powers of two above a program's reference, the largest score of its first block; where one is
larger, the program takes the largest of all and starts again."""

SMALLEST_TOP = -16
"""Powers of two by which a program's largest score may lie below its reference, before it starts again likewise."""

NORM_RANGE = (1e-15, 1e15)
"""When the rms norm of the V rows lies outside, squares of errors leave the range of float32, and the cache is streamed."""

FLOAT_ROUNDER = 1.5 * 2**23
"""Adding and subtracting it rounds a small float32 to an integer, whose bits are the low ones of the sum."""

rho = KAPPA * u * R
"""rms rounding error of the output in its own dtype."""

budget = alpha * rho
"""``B``: the allowed added rms error."""


def step(scale: sympy.Expr) -> sympy.Expr:
    """Quantization step of a row read at ``b`` bits; the stored scale already holds the 16/15 head-room of the dither."""
    return scale * 2 / 2**b


score_noise = step(s_K) * q / sympy.sqrt(12)
"""``sigma``, the rms error of a score whose K row is read at ``b`` bits."""

x = sympy.Symbol("x", positive=True)
weight_error_factor = sympy.horner(
    1 + sympy.Rational(7, 4) * x + sympy.Rational(31, 24) * x**2 + sympy.Rational(127, 192) * x**3
)
"""A weight computed from a score with normal error ``sigma`` is off by ``p (e^delta - 1)``, whose mean square is
``p^2 (e^(2 x) - 2 e^(x / 2) + 1) = p^2 x * factor`` with ``x = sigma^2``: this is the factor's series. It is near 1 for most
rows, and keeps rows whose 4-bit scores say little from being trusted."""

key_error_squared = p**2 * score_noise**2 * (v**2 + R**2)
"""``eK^2`` to first order: squared error that one K row read at ``b`` bits adds to the output. A score error moves the output
by ``p * ||v_j - o||``, whose square is ``v^2 + R^2`` for a V row uncorrelated with the output. At 4 bits it is multiplied by
``weight_error_factor``; at 8 bits that factor is 1 within a percent."""

value_error_squared = p**2 * step(s_V) ** 2 * D / 12
"""``eV^2``: squared error that one V row read at ``b`` bits adds to the output."""

key_coefficient = sympy.simplify(sympy.sqrt(key_error_squared / (p**2 * s_K**2 * (v**2 + R**2))))
"""``eK = key_coefficient * p * s_K * sqrt(v^2 + R^2)``."""

value_coefficient = sympy.sqrt(value_error_squared / (p**2 * s_V**2))
"""``eV = value_coefficient * p * s_V``."""

addend_sum = key_coefficient.subs(b, 8) * (P_sKv + R * P_sK) + value_coefficient.subs(b, 8) * P_sV
"""``E``: bound on the sum of all addends' errors at 8 bits, from the sums ``P_sKv = sum p s_K v``, ``P_sK = sum p s_K`` and
``P_sV = sum p s_V``. Empirical in one point: rows that stay at 4 bits are entered with their 8-bit error."""

threshold = sympy.Max(B**2 / E, B / sympy.sqrt(2 * N))
"""``theta``: addends with ``e <= theta`` have ``sum e^2 <= min(theta E, 2 N theta^2) <= B^2`` for independent errors."""

mid_ratio = sympy.sqrt(row / plane)
"""The mid plane of a row is read where its error at 4 bits exceeds ``theta`` over this; the row itself where that at 8 bits
exceeds ``theta``. A given ``sum e^2`` takes the fewest bytes where every further read takes the same squared error off per
byte, and a row of the cache has ``row / plane`` times as many bytes as one of a plane."""

remaining_budget = sympy.sqrt(sympy.Max(B**2 - left, B**2 / 4))
"""``B`` once the K rows left at 4 bits have spent ``left`` (a sum of squares)."""

skip_threshold = sympy.Min(sympy.Max(B**2 / (P_v + n), B / sympy.sqrt(N)), theta_4)
"""``tau``: a V row answered by its block's mean instead of being read is an addend of error ``p max(v, n)``: it is off by
``p ||v_j - mean||``, and the mean's norm is at most about ``n``. Rows with ``p max(v, n) <= tau`` stay within ``B`` for
independent errors, since their sum is at most ``P_v + n`` with ``P_v = sum p v``. The 4 bits of a row cost what its next 4
cost, so ``tau`` is at most what addends of V at 4 bits are held to, ``theta_4 = theta / mid_ratio``. (A rule on the skipped
mass with a measured constant would let peaked attention skip single heavy rows.)"""

predicted_bytes = rows_K8 * plane_K + rows_K * row_K + (rows_V4 + rows_V8) * plane_V + rows_V * row_V
"""Bytes to be read after the score pass: row counts times bytes per row (``plane_*`` one 4-bit plane, ``row_*`` the cache)."""

EXPRESSIONS: Mapping[str, sympy.Expr] = {
    "budget": budget,
    "weight_error_factor": weight_error_factor,
    "key_coefficient": key_coefficient,
    "value_coefficient": value_coefficient,
    "addend_sum": addend_sum,
    "threshold": threshold,
    "mid_ratio": mid_ratio,
    "remaining_budget": remaining_budget,
    "skip_threshold": skip_threshold,
    "predicted_bytes": predicted_bytes,
}
"""Every named formula that the kernels evaluate."""


@functools.cache
def _lambdified(name: str) -> tuple[Callable[..., float], tuple[str, ...]]:
    expression = EXPRESSIONS[name]
    arguments = sorted(expression.free_symbols, key=str)
    return sympy.lambdify(arguments, expression, "math"), tuple(str(a) for a in arguments)


def evaluate(name: str, **values: float) -> float:
    """Value of a named formula in double precision.

    Args:
        name: a key of :data:`EXPRESSIONS`.
        **values: every symbol of the expression by its name; others are ignored.

    Raises:
        KeyError: an unknown name or a missing symbol.
    """
    function, arguments = _lambdified(name)
    try:
        return float(function(*(float(values[a]) for a in arguments)))
    except ZeroDivisionError:
        return math.inf


def mid_ratios(arena: ArenaLayout, element_size: int) -> tuple[float, float]:
    """:data:`mid_ratio` of K and of V, whose cache has ``element_size`` bytes per number."""
    key = evaluate("mid_ratio", row=arena.key_dim * element_size, plane=arena.key_plane_row)
    value = evaluate("mid_ratio", row=arena.value_dim * element_size, plane=arena.value_plane_row)
    return key, value


def print_cpp_function(
    function: str,
    name: str,
    arguments: Sequence[str],
    constants: Mapping[str, float] | None = None,
    expressions: Mapping[str, sympy.Expr] = EXPRESSIONS,
) -> str:
    """A named formula as a C++ function from floats to float, evaluated in double.

    Args:
        function: name of the C++ function.
        name: a key of ``expressions``.
        arguments: the formula's symbols in the order of the function's parameters.
        constants: values for the remaining symbols.
        expressions: the formulas by name.

    Raises:
        ValueError: a symbol is neither an argument nor a constant, or one is named that the formula lacks.
    """
    expression = expressions[name]
    values = constants or {}
    named, free = {*arguments, *values}, {str(symbol) for symbol in expression.free_symbols}
    if named != free:
        raise ValueError(f"{name} is a formula of {sorted(free)}, not of {sorted(named)}")
    expression = sympy.N(expression.subs({_symbol(k): sympy.Float(value, 17) for k, value in values.items()}), 17)
    text = sympy.ccode(expression).replace("fmax(", "std::max<double>(").replace("fmin(", "std::min<double>(")
    parameters = ", ".join(f"double {argument}" for argument in arguments)
    return f"static inline float {function}({parameters}) {{ return (float)({text}); }}"


def print_cpp_vector_function(
    function: str, name: str, arguments: Sequence[str], expressions: Mapping[str, sympy.Expr] = EXPRESSIONS
) -> str:
    """A named formula of sums, products and exponentials as a C++ function of ``vf``, vectors of floats, symbols in order."""
    text = sympy.ccode(expressions[name], type_aliases={real: float32}).replace("expf(", "vexp(")
    parameters = ", ".join(f"vf {argument}" for argument in arguments)
    return f"static inline vf {function}({parameters}) {{ return {text}; }}"


class _TritonPrinter(StrPrinter):
    """Expressions of numbers, sums, products, powers, minima and maxima as Triton; ``constants`` name compile-time numbers."""

    _default_settings: ClassVar[dict[str, object]] = {**StrPrinter._default_settings, "constants": ()}

    def _print_Max(self, expression: sympy.Expr) -> str:  # noqa: N802 (sympy looks it up by class)
        return functools.reduce(lambda a, b: f"tl.maximum({a}, {b})", map(self._print, expression.args))

    def _print_Min(self, expression: sympy.Expr) -> str:  # noqa: N802
        return functools.reduce(lambda a, b: f"tl.minimum({a}, {b})", map(self._print, expression.args))

    def _print_Pow(self, expression: sympy.Expr, rational: bool = False) -> str:  # noqa: N802
        base, exponent = self._print(expression.base), float(expression.exp)
        if exponent < 0:
            return f"(1.0 / {self._print(expression.base**-expression.exp)})"
        if exponent == 0.5:
            return f"({base} ** 0.5)" if base in self._settings["constants"] else f"tl.sqrt({base})"
        if exponent != int(exponent):
            raise ValueError(f"no Triton for the exponent {exponent}")
        return "(" + " * ".join([f"({base})"] * int(exponent)) + ")"


def print_triton_function(
    function: str,
    name: str,
    arguments: Sequence[str],
    constants: Sequence[str] = (),
    *,
    values: Mapping[str, float] | None = None,
    double: bool = True,
) -> str:
    """A named formula as a ``triton.jit`` function from float32 to float32, elementwise.

    Args:
        function: name of the function.
        name: a key of :data:`EXPRESSIONS`.
        arguments: symbols that are tensors, in the order of the parameters.
        constants: symbols that are ``tl.constexpr`` parameters, after the others.
        values: numbers for the remaining symbols.
        double: evaluate in float64: products of small errors leave the range of float32.

    Raises:
        ValueError: the formula has other symbols than those named.
    """
    expression = EXPRESSIONS[name]
    numbers = values or {}
    named, free = {*arguments, *constants, *numbers}, {str(symbol) for symbol in expression.free_symbols}
    if named != free:
        raise ValueError(f"{name} is a formula of {sorted(free)}, not of {sorted(named)}")
    expression = sympy.N(expression.subs({_symbol(k): sympy.Float(value, 17) for k, value in numbers.items()}), 17)
    parameters = ", ".join([*arguments, *(f"{constant}: tl.constexpr" for constant in constants)])
    lines = ["@triton.jit", f"def {function}({parameters}):"]
    if double:
        lines += [f"    {argument} = {argument}.to(tl.float64)" for argument in arguments]
    text = _TritonPrinter({"constants": tuple(constants)}).doprint(expression)
    return "\n".join([*lines, f"    return ({text}).to(tl.float32)"])


def _symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, positive=True)
