"""The interpreter's repairs: each one is needed (without it the numbers are wrong), and each one suffices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
import triton_interpreter
from torch._inductor.utils import run_and_get_code
from triton.language.extra import libdevice
from triton.runtime import interpreter
from triton_interpreter import interpreted, repaired


@triton.jit
def _convert(source: tl.tensor, target: tl.tensor, count: tl.constexpr):
    index = tl.arange(0, count)
    tl.store(target + index, tl.load(source + index).to(target.dtype.element_ty))


@triton.jit
def _multiply(left: tl.tensor, right: tl.tensor, out: tl.tensor, size: tl.constexpr):
    row, column = tl.arange(0, size)[:, None], tl.arange(0, size)[None, :]
    tl.store(out + row * size + column, tl.dot(tl.load(left + row * size + column), tl.load(right + row * size + column)))


@triton.jit
def _reciprocal_root(source: tl.tensor, target: tl.tensor, count: tl.constexpr):
    index = tl.arange(0, count)
    tl.store(target + index, libdevice.rsqrt(tl.load(source + index)))


def _launch(kernel: object, *arguments: object) -> None:
    with interpreted():
        pass  # checks that leaving it restores everything: what follows sees an unrepaired interpreter
    kernel[(1,)](*arguments)  # type: ignore[index]


NUMBERS = torch.tensor([1.0, -1.00390625, 1.01171875, 3.0e38, -2.0e-30, 0.0, torch.inf, 127.0])


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (NUMBERS, torch.bfloat16),
        (torch.arange(-4, 4, dtype=torch.int8), torch.bfloat16),
        (torch.arange(-4, 4).bfloat16(), torch.int8),
        (NUMBERS[:3].repeat(3)[:8].bfloat16(), torch.float16),
        (torch.arange(1, 9, dtype=torch.int16).view(torch.bfloat16), torch.float32),
    ],
)
def test_bfloat16_casts(source: torch.Tensor, target: torch.dtype) -> None:
    out = torch.empty(8, dtype=target)
    with repaired():
        _launch(_convert, source, out, 8)
    assert torch.equal(out, source.to(target))


def test_bfloat16_casts_need_the_repair() -> None:
    out = torch.empty(8, dtype=torch.bfloat16)
    _launch(_convert, NUMBERS, out, 8)
    assert not torch.equal(out, NUMBERS.bfloat16()), "float32 to bfloat16 rounds now: drop repair_bfloat16_casts"


@pytest.mark.parametrize("repairs", [triton_interpreter.REPAIRS, ()])
def test_bfloat16_dot(repairs: tuple[Callable[..., None], ...]) -> None:
    left, right = torch.randn(2, 16, 16).bfloat16()
    out = torch.empty(16, 16)
    with repaired(repairs):
        _launch(_multiply, left, right, out, 16)
    right_answer = torch.allclose(out, left.float() @ right.float(), rtol=1e-5, atol=1e-5)
    assert right_answer == bool(repairs), "without the repair the interpreter multiplies bits"


def test_libdevice() -> None:
    out = torch.empty(8)
    numbers = torch.rand(8) + 0.5
    with repaired():
        _launch(_reciprocal_root, numbers, out, 8)
    torch.testing.assert_close(out, numbers.rsqrt())
    with pytest.raises(Exception, match=r"."):  # whatever it raises: there is no such function
        _launch(_reciprocal_root, numbers, out, 8)


@triton.jit
def _double(x: tl.tensor):
    return x + x


@triton.jit
def _octuple(source: tl.tensor, out: tl.tensor, count: tl.constexpr):
    index = tl.arange(0, count)
    tl.store(out + index, _double(_double(_double(tl.load(source + index)))))


@pytest.mark.parametrize(("repairs", "times"), [(triton_interpreter.REPAIRS, 1), ((), 4)])
def test_the_language_is_patched_once(
    monkeypatch: pytest.MonkeyPatch, repairs: tuple[Callable[..., None], ...], times: int
) -> None:
    patched, patch_lang = [], interpreter._patch_lang
    monkeypatch.setattr(interpreter, "_patch_lang", lambda function: patched.append(function) or patch_lang(function))
    out = torch.empty(8)
    with repaired(repairs):
        _launch(_octuple, torch.arange(8.0), out, 8)
    assert torch.equal(out, 8 * torch.arange(8.0))
    assert len(patched) == times


def test_not_a_number_is_ignored_by_maxima_as_on_gpus() -> None:
    """``tl.max`` and ``tl.maximum`` return the number; the templates count on it nowhere, and this says which way it is
    here."""

    @triton.jit
    def largest(source: tl.tensor, out: tl.tensor, count: tl.constexpr):
        tl.store(out, tl.max(tl.load(source + tl.arange(0, count)), 0))

    out = torch.empty(1)
    with repaired():
        _launch(largest, torch.tensor([1.0, torch.nan, 3.0, 2.0]), out, 4)
    assert out.item() == 3.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_inductor_makes_triton_of_functions_of_cpu_tensors(dtype: torch.dtype) -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x + y).softmax(-1) * torch.rsqrt(y.abs() + 1)

    x, y = torch.randn(2, 8, 33).to(dtype)
    with interpreted():
        out, code = run_and_get_code(torch.compile(function), x, y)
    assert "@triton.jit" in code[0]
    assert "cpp_fused" not in code[0]
    expected = function(x.double(), y.double())
    torch.testing.assert_close(out.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    assert triton.runtime.driver._active is None, "the stand-in driver is gone"
