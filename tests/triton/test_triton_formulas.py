"""The error model as Triton: every printed formula, run in the interpreter, against sympy's value."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton
from triton_interpreter import repaired

from alignedkv_compile import precision
from alignedkv_compile.lowering.triton.shared import shared_functions
from alignedkv_compile.storage import BESIDE

ARGUMENTS = {
    "error_budget": ("budget", ("R",), {"alpha": 2.0, "u": 2.0**-8}),
    "skip_threshold": ("skip_threshold", ("B", "N", "P_v", "n", "theta_4"), {}),
    "addend_sum": ("addend_sum", ("P_sK", "P_sKv", "P_sV", "R", "q"), {"D": 80}),
    "threshold": ("threshold", ("B", "E", "N"), {}),
    "remaining_budget": ("remaining_budget", ("B", "left"), {}),
    "key_coefficient_4": ("key_coefficient", ("q",), {}),
    "weight_error_factor": ("weight_error_factor", ("x",), {}),
}


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The shared functions, and for each formula a kernel ``run_<name>`` that loads its arguments and stores its value."""
    text = ["import triton", "import triton.language as tl", shared_functions(BESIDE)]
    for name, (_, arguments, constants) in ARGUMENTS.items():
        loads = [f"tl.load(inputs + {index} + tl.arange(0, 1))" for index in range(len(arguments))]
        values = ", ".join([*loads, *map(str, constants.values())])
        text.append(f"@triton.jit\ndef run_{name}(inputs, out):\n    tl.store(out + tl.arange(0, 1), {name}({values}))")
    path = Path(tmp_path_factory.mktemp("formulas")) / "formulas.py"
    path.write_text("\n\n\n".join(text))
    spec = importlib.util.spec_from_file_location("printed_formulas", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e12])
def test_printed_formula(functions: ModuleType, name: str, size: float) -> None:
    formula, arguments, constants = ARGUMENTS[name]
    numbers = [size * (0.7 + 0.1 * index) for index in range(len(arguments))]
    if name == "weight_error_factor":
        numbers = [min(size, 4.0)]
    out = torch.empty(1)
    with repaired():
        getattr(functions, f"run_{name}")[(1,)](torch.tensor(numbers), out)
    bits = {"b": int(name[-1])} if name.startswith("key_coefficient") else {}
    values = dict(zip(arguments, torch.tensor(numbers).tolist(), strict=True))
    expected = precision.evaluate(formula, **values, **constants, **bits)
    assert out.item() == pytest.approx(expected, rel=2.0**-22)


def test_a_formula_of_other_symbols_is_refused() -> None:
    with pytest.raises(ValueError, match="not of"):
        precision.print_triton_function("f", "threshold", ("B", "N"))


def test_the_printed_functions_are_jitted(functions: ModuleType) -> None:
    assert all(isinstance(getattr(functions, name), type(triton.jit(lambda: None))) for name in ARGUMENTS)
