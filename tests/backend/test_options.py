"""Options: what is taken, and what an error says."""

from __future__ import annotations

import math

import pytest
import torch

from alignedkv_compile import (
    Options,
    OptionValueError,
    UnknownInductorOptionError,
    UnknownModeError,
    UnknownOptionError,
    alignedkv,
)
from alignedkv_compile.options import MODES, OPTION_NAMES, parse
from alignedkv_compile.own_kernels import post_grad_pass


def test_defaults() -> None:
    assert parse() == Options()
    assert parse(None, {}) == Options(tolerance=2.0, strict=False, stats=False, accuracy=None, assume_exclusive_cache=False)
    assert not parse().certified


def test_every_option_is_taken() -> None:
    given = {
        "tolerance": 0,
        "guarantee": "worst_case",
        "min_context": 16,
        "calibrate": False,
        "strict": True,
        "stats": True,
        "accuracy": "torch.float16",
        "assume_exclusive_cache": True,
        "memory": "planes",
        "shadow_every": 1000,
        "share_layers": False,
        "inductor": {"freezing": True, "max-autotune": False},
    }
    assert set(given) == set(OPTION_NAMES)
    options = parse("max-autotune", given)
    assert (options.tolerance, options.min_context, options.strict, options.stats) == (0.0, 16, True, True)
    assert options.certified
    assert options.accuracy is torch.float16
    assert options.assume_exclusive_cache
    assert options.memory == "planes"
    assert options.without_planes.tolerance == 0.0
    assert options.shadow_every == 1000
    assert not options.share_layers
    assert not options.calibrate
    assert options.inductor_patches()["freezing"] is True
    assert options.inductor_patches()["max_autotune"] is False  # overrides the mode
    assert options.inductor_patches()["coordinate_descent_tuning"] is True


@pytest.mark.parametrize(
    "options", [{"guarantee": "worst_case"}, {"tolerance": 1}, {"min_context": 7}, {"accuracy": "float16"}]
)
def test_inductors_cache_key_knows_the_options(options: dict[str, object]) -> None:
    assert post_grad_pass(parse(None, options)).uuid() != post_grad_pass(parse()).uuid()
    assert post_grad_pass(parse(None, options)).uuid() == post_grad_pass(parse(None, options)).uuid()


@pytest.mark.parametrize("mode", [None, *MODES])
def test_modes_are_inductors(mode: str | None) -> None:
    expected = torch._inductor.list_mode_options(mode) if mode else {}
    assert parse(mode).inductor_patches() == expected


def test_unit_roundoff() -> None:
    assert [Options().unit_roundoff(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)] == [
        2**-8,
        2**-11,
        2**-24,
    ]
    assert parse(None, {"accuracy": "float16"}).unit_roundoff(torch.float32) == 2**-11
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert dtype.is_floating_point
        # eps is the distance of 1 to the next number, twice the largest relative error of rounding
        assert Options().unit_roundoff(dtype) == torch.finfo(dtype).eps / 2


@pytest.mark.parametrize(
    ("mode", "options", "error", "words"),
    [
        ("fast", None, UnknownModeError, ["'fast'", "'reduce-overhead'"]),
        ("max-autotun", None, UnknownModeError, ["Did you mean 'max-autotune'"]),
        (None, {"tolerence": 1}, UnknownOptionError, ["'tolerence'", "given 1", "Did you mean 'tolerance'?", "min_context"]),
        (None, {"mode": "default"}, UnknownOptionError, ["'mode'"]),
        (None, {"tolerance": -1}, OptionValueError, ["'tolerance'", "-1", ">= 0"]),
        (None, {"tolerance": math.inf}, OptionValueError, ["inf"]),
        (None, {"tolerance": math.nan}, OptionValueError, ["nan"]),
        (None, {"tolerance": True}, OptionValueError, ["True"]),
        (None, {"tolerance": "2"}, OptionValueError, ["'2'"]),
        (None, {"guarantee": "worst"}, OptionValueError, ["'guarantee'", "'worst'", "'expected' or 'worst_case'"]),
        (None, {"guarantee": True}, OptionValueError, ["'guarantee'", "True"]),
        (None, {"min_context": 1.5}, OptionValueError, ["'min_context'", "1.5", "int >= 0"]),
        (None, {"shadow_every": -1}, OptionValueError, ["'shadow_every'", "-1", "int >= 0"]),
        (None, {"shadow_every": True}, OptionValueError, ["'shadow_every'", "True"]),
        (None, {"strict": 1}, OptionValueError, ["'strict'", "True or False"]),
        (None, {"accuracy": "int8"}, OptionValueError, ["'accuracy'", "'int8'", "bfloat16, float16, float32"]),
        (None, {"accuracy": torch.int8}, OptionValueError, ["torch.int8"]),
        (None, {"inductor": [1]}, OptionValueError, ["'inductor'", "freezing"]),
        (None, {"inductor": {"frezing": True}}, UnknownInductorOptionError, ["'frezing'", "Did you mean 'freezing'"]),
        (None, {"inductor": {"freezing": "yes"}}, OptionValueError, ["freezing", "'yes'", "bool"]),
        (None, ["tolerance"], OptionValueError, ["'options'", "dict"]),
    ],
)
def test_errors_name_the_option_the_value_and_what_is_allowed(
    mode: str | None, options: dict[str, object] | None, error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as raised:
        parse(mode, options)
    for word in words:
        assert word in str(raised.value)


def test_unknown_keyword_arguments_of_the_backend() -> None:
    with pytest.raises(UnknownOptionError, match="unknown option 'dynamic'"):
        alignedkv(torch.fx.symbolic_trace(lambda x: x), [torch.ones(1)], dynamic=True)


def test_a_bad_option_reaches_the_user_through_torch_compile() -> None:
    compiled = torch.compile(lambda x: x + 1, backend="alignedkv", options={"tolerence": 1})
    with pytest.raises(Exception, match="Did you mean 'tolerance'"):
        compiled(torch.ones(2))
