"""The error model: one source for Python and C++, and what its bounds promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignedkv_compile import precision
from alignedkv_compile.lowering.formulas import policy_formulas
from alignedkv_compile.precision import EXPRESSIONS, evaluate, print_cpp_function, print_cpp_vector_function


def test_kappa_is_the_rms_of_a_rounding_error() -> None:
    """Numbers with log-uniform mantissa, rounded to bfloat16: rms relative error is kappa * u."""
    numbers = 2 ** torch.rand(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = (numbers.float().bfloat16().double() - numbers) / numbers
    assert float(error.square().mean().sqrt()) == pytest.approx(float(precision.KAPPA) * 2**-8, rel=0.01)


@given(st.floats(0.01, 0.7))
def test_weight_error_factor_is_the_mean_square_of_a_weight_error(sigma: float) -> None:
    deltas = np.random.default_rng(0).normal(0, sigma, 400_000)
    measured = math.sqrt(np.mean((1 - np.exp(-deltas)) ** 2))
    assert sigma * math.sqrt(evaluate("weight_error_factor", x=sigma**2)) == pytest.approx(measured, rel=0.05)


@given(
    st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=200),
    st.floats(1e-6, 1.0),
)
def test_threshold_bounds_the_sum_of_squares(errors: list[float], budget: float) -> None:
    """Addends at or below theta have a root sum of squares of at most B."""
    theta = evaluate("threshold", B=budget, E=sum(errors), N=len(errors) / 2)
    left = [e for e in errors if e <= theta]
    assert math.sqrt(sum(e * e for e in left)) <= budget * (1 + 1e-9)


@given(
    st.lists(st.tuples(st.floats(1e-4, 1.0), st.floats(1e-3, 10.0)), min_size=2, max_size=200),
    st.floats(1e-6, 1.0),
)
def test_skip_threshold_bounds_the_sum_of_squares(rows: list[tuple[float, float]], budget: float) -> None:
    total = sum(p for p, _ in rows)
    rows = [(p / total, v) for p, v in rows]
    rms = math.sqrt(sum(v * v for _, v in rows) / len(rows))
    tau = evaluate("skip_threshold", theta_4=math.inf, B=budget, P_v=sum(p * v for p, v in rows), n=rms, N=len(rows))
    left = [p * max(v, rms) for p, v in rows if p * max(v, rms) <= tau]
    assert math.sqrt(sum(e * e for e in left)) <= budget * (1 + 1e-9)


def test_printed_cpp_has_the_formulas_of_python() -> None:
    """Every formula that the kernel holds, printed, agrees with its value in Python."""
    values = {
        name: 0.3 + 0.1 * i for i, name in enumerate(sorted({str(s) for e in EXPRESSIONS.values() for s in e.free_symbols}))
    }
    for name, expression in EXPRESSIONS.items():
        arguments = sorted(str(symbol) for symbol in expression.free_symbols)
        if "b" in arguments or name == "weight_error_factor":
            continue
        text = print_cpp_function("f", name, arguments)
        body = text[text.index("return (float)(") + len("return (float)(") : text.rindex("); }")]
        python = (
            body.replace("std::max<double>(", "max(")
            .replace("std::min<double>(", "min(")
            .replace("pow(", "math.pow(")
            .replace("sqrt(", "math.sqrt(")
        )
        python = python.replace("math.math.", "math.")
        assert eval(python, {"math": math, "max": max, "min": min, **values}) == pytest.approx(
            evaluate(name, **values), rel=1e-12
        ), name


def test_generated_code_holds_every_formula() -> None:
    text = policy_formulas(64, 64, 2)
    for name in EXPRESSIONS:
        assert name in text or name.upper() in text, name


def test_a_formula_is_printed_only_with_all_its_symbols() -> None:
    with pytest.raises(ValueError, match="threshold is a formula of"):
        print_cpp_function("f", "threshold", ("B", "E"))
    with pytest.raises(KeyError):
        evaluate("threshold", B=1.0)
    assert print_cpp_vector_function("f", "weight_error_factor", "x").startswith("static inline vf f(vf x)")
