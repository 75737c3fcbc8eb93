"""One error model: docs, reference and the C++ that the kernels are generated with say what the sympy expressions say."""

from __future__ import annotations

import ctypes
import math
import os
import random
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import sympy
import torch

from alignedkv_compile import formula_page, precision, reference_worst_case
from alignedkv_compile.lowering.attention import Constants, _formulas
from alignedkv_compile.precision import EXPRESSIONS, evaluate
from alignedkv_compile.reference import _weight_error
from alignedkv_compile.worst_case import WORST_CASE

POINTS = 25
PAGE = Path(__file__).parents[2] / "docs" / "formulas.md"


def points(expression: sympy.Expr, seed: str) -> list[dict[str, float]]:
    """Random values of an expression's symbols, log-uniform in [1e-3, 1e3]; bits are 4 or 8, score bounds below 3."""
    generator = random.Random(seed)
    names = sorted(str(symbol) for symbol in expression.free_symbols)

    def draw(name: str) -> float:
        if name == "b":
            return generator.choice((4.0, 8.0))
        return 10 ** generator.uniform(-3, 0.4 if name in ("d", "x") else 3)

    return [{name: draw(name) for name in names} for _ in range(POINTS)]


def sympy_value(expression: sympy.Expr, values: dict[str, float]) -> float:
    """The expression in 30 digits."""
    exact = {symbol: sympy.Float(values[str(symbol)], 30) for symbol in expression.free_symbols}
    if any(str(symbol) == "b" for symbol in exact):
        exact = {s: sympy.Integer(int(x)) if str(s) == "b" else x for s, x in exact.items()}
    return float(sympy.N(expression.subs(exact), 30))


def test_formula_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == formula_page.render(), "run `make docs`"


def test_every_formula_and_symbol_is_explained() -> None:
    assert set(formula_page.NOTES) == set(EXPRESSIONS) | set(WORST_CASE)
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(formula_page.SYMBOLS, "alpha")  # type: ignore[arg-type]
        with pytest.raises(KeyError, match="alpha"):
            formula_page.render()


@pytest.mark.parametrize("name", list(EXPRESSIONS))
def test_reference_evaluates_the_expression(name: str) -> None:
    for values in points(EXPRESSIONS[name], name):
        assert evaluate(name, **values) == pytest.approx(sympy_value(EXPRESSIONS[name], values), rel=1e-12)


@pytest.mark.parametrize("name", list(WORST_CASE))
def test_certified_reference_evaluates_the_expression(name: str) -> None:
    formula = reference_worst_case._formula(name)
    for values in points(WORST_CASE[name], name):
        tensors = {key: x if key in ("b", "D", "D_K") else torch.tensor(x, dtype=torch.float64) for key, x in values.items()}
        found = formula(**tensors)
        assert float(found) == pytest.approx(sympy_value(WORST_CASE[name], values), rel=1e-12)


def test_reference_weight_error_is_the_expression() -> None:
    sigma = torch.linspace(0.01, 2.0, 40)
    expected = [s * math.sqrt(sympy_value(EXPRESSIONS["weight_error_factor"], {"x": s * s})) for s in sigma.tolist()]
    torch.testing.assert_close(_weight_error(sigma), torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.fixture(scope="module")
def kernel_formulas(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    """The formulas exactly as the kernel template gets them, compiled by themselves with the kernels' arithmetic flags."""
    constants = Constants(64, 96, 1, 1, 0.125, 2.0, 2**-8, 0, None, 0)  # type: ignore[arg-type]
    text = _formulas(constants)
    functions = re.findall(r"static inline (float|vf) (\w+)\(([^)]*)\)", text)
    wrappers = []
    for kind, name, parameters in functions:
        arguments = [part.split()[-1] for part in parameters.split(",")]
        if kind == "vf":
            wrappers.append(f'extern "C" float call_{name}(double x) {{ return {name}((float)x - vf{{}})[3]; }}')
        else:
            declared = ", ".join(f"double {argument}" for argument in arguments)
            wrappers.append(f'extern "C" float call_{name}({declared}) {{ return {name}({", ".join(arguments)}); }}')
    values = re.findall(r"([A-Z][A-Z_0-9]*) = [-+0-9.e]+f?", text)
    wrappers += [f'extern "C" double value_{name}() {{ return {name}; }}' for name in values]
    folder = tmp_path_factory.mktemp("formulas")
    source = folder / "formulas.cpp"
    head = "#include <algorithm>\n#include <cmath>\n#include <cstdint>\ntypedef float vf __attribute__((vector_size(32)));\n"
    source.write_text(head + "using std::sqrt; using std::pow;\n" + text + "\n" + "\n".join(wrappers))
    library = folder / "formulas.so"
    compiler = os.environ.get("CXX", "g++")
    flags = ["-std=c++20", "-O3", "-ffp-contract=off", "-shared", "-fPIC", "-Wno-psabi"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True, capture_output=True)
    return ctypes.CDLL(str(library))  # type: ignore[return-value]


CPP_NAMES = {
    "budget": ("error_budget", {"alpha": None, "R": None, "u": None}),
    "skip_threshold": ("skip_threshold", {"B": None, "N": None, "P_v": None, "n": None}),
    "addend_sum": ("addend_sum", {"P_sK": None, "P_sKv": None, "P_sV": None, "R": None, "q": None, "D": 96.0, "c_q": 2.0}),
    "threshold": ("threshold", {"B": None, "E": None, "N": None}),
    "remaining_budget": ("remaining_budget", {"B": None, "left": None}),
    "weight_error_factor": ("weight_error_factor", {"x": None}),
}
"""C++ name of every formula and its arguments in order; a number is a constant that was printed in."""


@pytest.mark.parametrize("name", list(CPP_NAMES))
def test_generated_cpp_computes_the_expression(kernel_formulas: ctypes.CDLL, name: str) -> None:
    function, arguments = CPP_NAMES[name]
    call = getattr(kernel_formulas, f"call_{function}")
    call.restype, call.argtypes = ctypes.c_float, [ctypes.c_double] * sum(x is None for x in arguments.values())
    for values in points(EXPRESSIONS[name], name):
        values |= {key: fixed for key, fixed in arguments.items() if fixed is not None}
        found = call(*(values[key] for key, fixed in arguments.items() if fixed is None))
        # the result is a float; the vector function's arithmetic is in floats, too
        assert found == pytest.approx(sympy_value(EXPRESSIONS[name], values), rel=2.0**-21), values


def test_generated_cpp_holds_the_coefficients_and_constants(kernel_formulas: ctypes.CDLL) -> None:
    def value(name: str) -> float:
        function = getattr(kernel_formulas, f"value_{name}")
        function.restype = ctypes.c_double
        return float(function())

    for bits in (4, 8):
        call = getattr(kernel_formulas, f"call_key_coefficient_{bits}")
        call.restype, call.argtypes = ctypes.c_float, [ctypes.c_double]
        for q in (0.01, 1.7, 230.0):
            expected = sympy_value(EXPRESSIONS["key_coefficient"], {"q": q, "b": float(bits), "c_q": 2.0})
            assert call(q) == pytest.approx(expected, rel=2.0**-23)
        expected = sympy_value(EXPRESSIONS["value_coefficient"], {"D": 96.0, "b": float(bits)})
        assert value(f"VALUE_COEFFICIENT_{bits}") == pytest.approx(expected, rel=2.0**-23)
    assert value("ALPHA") == 2.0
    assert value("ROUNDOFF") == 2.0**-8
    assert value("STREAM_FRACTION") == pytest.approx(float(precision.STREAM_FRACTION), rel=2.0**-23)
    assert value("MIN_NORM") == pytest.approx(precision.NORM_RANGE[0], rel=2.0**-23)
    assert value("MAX_NORM") == pytest.approx(precision.NORM_RANGE[1], rel=2.0**-23)


@pytest.mark.parametrize(("roundoff", "noise"), [(2.0**-8, 2.0), (2.0**-11, 1.0), (2.0**-24, 1.0)])
def test_generated_cpp_has_the_query_noise_of_its_accuracy(roundoff: float, noise: float) -> None:
    text = _formulas(Constants(64, 96, 1, 1, 0.125, 2.0, roundoff, 0, None, 0))  # type: ignore[arg-type]
    (coefficient,) = re.findall(r"key_coefficient_8\(double q\) \{ return \(float\)\(([0-9.e-]+)\*q\)", text)
    assert float(coefficient) == pytest.approx(math.sqrt(noise / 12) / 128, rel=1e-15)
    (coefficient,) = re.findall(r"([0-9.e-]+)\*q\*\(P_sK\*R", text)
    assert float(coefficient) == pytest.approx(math.sqrt(noise / 12) / 128, rel=1e-15)


def test_generated_cpp_predicts_the_bytes(kernel_formulas: ctypes.CDLL) -> None:
    names = ("plane_K", "plane_V", "row_K", "row_V", "rows_K", "rows_K8", "rows_V", "rows_V4", "rows_V8")
    call = kernel_formulas.call_predicted_bytes
    call.restype, call.argtypes = ctypes.c_float, [ctypes.c_double] * len(names)
    for values in points(EXPRESSIONS["predicted_bytes"], "bytes"):
        found = call(*(values[name] for name in names))
        assert found == pytest.approx(sympy_value(EXPRESSIONS["predicted_bytes"], values), rel=2.0**-23)
