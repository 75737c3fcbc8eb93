"""One error model: docs, reference and the C++ that the kernels are generated with say what the sympy expressions say."""

from __future__ import annotations

import ctypes
import math
import os
import random
import re
import subprocess
from pathlib import Path

import pytest
import sympy
import torch

from alignedkv_compile import formula_page, precision, reference_worst_case, worst_case
from alignedkv_compile.layout import ArenaLayout
from alignedkv_compile.lowering.constants import SHARED, option_constants, print_cpp
from alignedkv_compile.lowering.formulas import certified_formulas, policy_formulas
from alignedkv_compile.precision import EXPRESSIONS, evaluate
from alignedkv_compile.reference_head import weight_error
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
    torch.testing.assert_close(weight_error(sigma), torch.tensor(expected), rtol=1e-5, atol=0)


CONSTANTS = print_cpp({**SHARED, **option_constants(2.0, 2.0**-8, 0)})


@pytest.fixture(scope="module")
def kernel_formulas(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The formulas of the read policy exactly as the kernel template gets them."""
    return compile_formulas(f"{CONSTANTS}\n{policy_formulas(64, 96, 2)}", tmp_path_factory.mktemp("formulas"))


@pytest.fixture(scope="module")
def kernel_certificate(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The same of the certified read."""
    return compile_formulas(f"{CONSTANTS}\n{certified_formulas(64, 96)}", tmp_path_factory.mktemp("certified"))


def compile_formulas(text: str, folder: Path) -> ctypes.CDLL:
    """The functions by themselves, compiled with the kernels' arithmetic flags and with an exact exponential."""
    functions = re.findall(r"static inline (float|vf) (\w+)\(([^)]*)\)", text)
    wrappers = []
    for kind, name, parameters in functions:
        arguments = [part.split()[-1] for part in parameters.split(",")]
        if kind == "vf":
            declared = ", ".join(f"double {argument}" for argument in arguments)
            vectors = ", ".join(f"(float){argument} - vf{{}}" for argument in arguments)
            wrappers.append(f'extern "C" float call_{name}({declared}) {{ return {name}({vectors})[3]; }}')
        else:
            declared = ", ".join(f"double {argument}" for argument in arguments)
            wrappers.append(f'extern "C" float call_{name}({declared}) {{ return {name}({", ".join(arguments)}); }}')
    values = re.findall(r"([A-Z][A-Z_0-9]*) = [-+0-9.e]+f?", text)
    wrappers += [f'extern "C" double value_{name}() {{ return {name}; }}' for name in values]
    source = folder / "formulas.cpp"
    head = "#include <algorithm>\n#include <cmath>\n#include <cstdint>\ntypedef float vf __attribute__((vector_size(32)));\n"
    head += "static inline vf vexp(vf x) { for (int i = 0; i < 8; ++i) x[i] = std::exp(x[i]); return x; }\n"
    source.write_text(head + "using std::sqrt; using std::pow;\n" + text + "\n" + "\n".join(wrappers))
    library = folder / "formulas.so"
    compiler = os.environ.get("CXX", "g++")
    flags = ["-std=c++20", "-O3", "-ffp-contract=off", "-shared", "-fPIC", "-Wno-psabi"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True, capture_output=True)
    return ctypes.CDLL(str(library))


CPP_NAMES = {
    "budget": ("error_budget", {"alpha": None, "R": None, "u": None}),
    "skip_threshold": ("skip_threshold", {"B": None, "N": None, "P_v": None, "n": None, "theta_4": None}),
    "addend_sum": ("addend_sum", {"P_sK": None, "P_sKv": None, "P_sV": None, "R": None, "q": None, "D": 96.0}),
    "threshold": ("threshold", {"B": None, "E": None, "N": None}),
    "remaining_budget": ("remaining_budget", {"B": None, "left": None}),
    "weight_error_factor": ("weight_error_factor", {"x": None}),
}
"""C++ name of every formula and its arguments in order; a number is a constant that was printed in."""


CERTIFIED_CPP_NAMES = {
    "score_bound_4": ("score_bound", {"l_1": None, "q_1": None, "r_1": None, "s_K": None, "b": 4.0, "D_K": 64.0}),
    "score_bound_8": ("score_bound", {"l_1": None, "q_1": None, "r_1": None, "s_K": None, "b": 8.0, "D_K": 64.0}),
    "worst_case_budget": ("worst_case_budget", {"R": None, "alpha": None, "u": None}),
    "certificate": ("certificate", {"A": None, "R": None, "V": None, "W": None, "W_v": None}),
    "skipped_value_bound": ("skipped_value_bound", {"m": None, "v": None}),
    "growth": ("growth", {"d": None}),
    "key_addend": ("key_addend", {"R": None, "g": None, "p": None, "v": None}),
    "weight_error_bound": ("weight_error_bound", {"g": None, "p": None}),
    "weight_least": ("weight_least", {"d": None, "p": None}),
    "weight_slack": ("weight_slack", {"x": None}),
}
"""Formula of every C++ function of the certified read, and its arguments likewise."""


@pytest.mark.parametrize("name", list(CPP_NAMES))
def test_generated_cpp_computes_the_expression(kernel_formulas: ctypes.CDLL, name: str) -> None:
    function, arguments = CPP_NAMES[name]
    check_function(kernel_formulas, function, EXPRESSIONS[name], arguments)


@pytest.mark.parametrize("function", list(CERTIFIED_CPP_NAMES))
def test_generated_cpp_computes_the_certificate(kernel_certificate: ctypes.CDLL, function: str) -> None:
    name, arguments = CERTIFIED_CPP_NAMES[function]
    check_function(kernel_certificate, function, WORST_CASE[name], arguments)


def test_every_formula_of_the_certificate_is_printed() -> None:
    constants = {"value_bound"}  # printed as VALUE_BOUND_4 and VALUE_BOUND_8
    assert {name for name, _ in CERTIFIED_CPP_NAMES.values()} | constants == set(WORST_CASE)


def check_function(library: ctypes.CDLL, function: str, expression: sympy.Expr, arguments: dict[str, float | None]) -> None:
    call = getattr(library, f"call_{function}")
    call.restype, call.argtypes = ctypes.c_float, [ctypes.c_double] * sum(x is None for x in arguments.values())
    for values in points(expression, function):
        values |= {key: fixed for key, fixed in arguments.items() if fixed is not None}
        found = call(*(values[key] for key, fixed in arguments.items() if fixed is None))
        # the result is a float; the vector functions' arithmetic is in floats, too
        assert found == pytest.approx(sympy_value(expression, values), rel=2.0**-21), values


def constant(library: ctypes.CDLL, name: str) -> float:
    function = getattr(library, f"value_{name}")
    function.restype = ctypes.c_double
    return float(function())


def test_generated_cpp_holds_the_constants_of_the_certificate(kernel_certificate: ctypes.CDLL) -> None:
    expected = {
        "VALUE_BOUND_4": sympy_value(WORST_CASE["value_bound"], {"s_V": 1.0, "D": 96.0, "b": 4.0}),
        "VALUE_BOUND_8": sympy_value(WORST_CASE["value_bound"], {"s_V": 1.0, "D": 96.0, "b": 8.0}),
        "QUERY_SLACK": worst_case.query_slack(64),
        "SUM_SLACK": float(worst_case.SUM_SLACK),
        "FLOAT_SLACK": float(worst_case.FLOAT_SLACK),
        "SMALLEST_SCALE": worst_case.SMALLEST_SCALE,
        "LARGEST_SCORE_BOUND": worst_case.LARGEST_SCORE_BOUND,
        "KEY_SHARE": worst_case.SHARES["key"],
        "ACCEPTED_KEY_SHARE": worst_case.SHARES["accepted_key"],
        "ALPHA": 2.0,
        "ROUNDOFF": 2.0**-8,
    }
    for name, value in expected.items():
        assert constant(kernel_certificate, name) == pytest.approx(value, rel=2.0**-23), name


def test_generated_cpp_holds_the_coefficients_and_constants(kernel_formulas: ctypes.CDLL) -> None:
    def value(name: str) -> float:
        return constant(kernel_formulas, name)

    for bits in (4, 8):
        call = getattr(kernel_formulas, f"call_key_coefficient_{bits}")
        call.restype, call.argtypes = ctypes.c_float, [ctypes.c_double]
        for q in (0.01, 1.7, 230.0):
            expected = sympy_value(EXPRESSIONS["key_coefficient"], {"q": q, "b": float(bits)})
            assert call(q) == pytest.approx(expected, rel=2.0**-23)
        expected = sympy_value(EXPRESSIONS["value_coefficient"], {"D": 96.0, "b": float(bits)})
        assert value(f"VALUE_COEFFICIENT_{bits}") == pytest.approx(expected, rel=2.0**-23)
    ratios = precision.mid_ratios(ArenaLayout(1, 1, 64, 96), 2)
    assert (value("KEY_MID_RATIO"), value("VALUE_MID_RATIO")) == pytest.approx(ratios, rel=2.0**-23)
    assert value("ALPHA") == 2.0
    assert value("ROUNDOFF") == 2.0**-8
    assert value("STREAM_FRACTION") == pytest.approx(float(precision.STREAM_FRACTION), rel=2.0**-23)
    assert value("MIN_NORM") == pytest.approx(precision.NORM_RANGE[0], rel=2.0**-23)
    assert value("MAX_NORM") == pytest.approx(precision.NORM_RANGE[1], rel=2.0**-23)


def test_generated_cpp_predicts_the_bytes(kernel_formulas: ctypes.CDLL) -> None:
    names = ("plane_K", "plane_V", "row_K", "row_V", "rows_K", "rows_K8", "rows_V", "rows_V4", "rows_V8")
    call = kernel_formulas.call_predicted_bytes
    call.restype, call.argtypes = ctypes.c_float, [ctypes.c_double] * len(names)
    for values in points(EXPRESSIONS["predicted_bytes"], "bytes"):
        found = call(*(values[name] for name in names))
        assert found == pytest.approx(sympy_value(EXPRESSIONS["predicted_bytes"], values), rel=2.0**-23)
