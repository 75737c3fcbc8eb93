"""Generated C++ of caches that are arenas: the bytes that the reference writes, the rows and the attention that it gives."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from cases import Case, exact, keyed_caches, make_case, relative_errors

from alignedkv_compile import ops
from alignedkv_compile.arena import arena_views, unpack_scales
from alignedkv_compile.layout import ArenaLayout
from alignedkv_compile.ops import COUNTER_FIELDS
from alignedkv_compile.storage import STORAGES

slow = pytest.mark.slow
Rows = tuple[torch.Tensor, torch.Tensor]
SECTIONS = ("header", "scales", "key_hi", "key_mid", "value_hi", "value_mid", "residual", "value_count")

SHAPES = [  # storage, dtype, Dk, Dv; each with one instruction set in `make test`
    pytest.param(("4bit+", torch.bfloat16, 80, 40), id="4bit+-bf16-80-40"),
    pytest.param(("lossless", torch.bfloat16, 64, 64), id="lossless-bf16-64"),
    pytest.param(("lossless", torch.float16, 13, 128), id="lossless-fp16-13-128"),
    pytest.param(("lossless", torch.float32, 64, 64), id="lossless-fp32-64", marks=slow),
    pytest.param(("8bit", torch.bfloat16, 128, 128), id="8bit-bf16-128", marks=slow),
    pytest.param(("8bit", torch.float32, 192, 128), id="8bit-fp32-192-128", marks=slow),
]


@functools.cache
def compiled(operator: Callable[..., object]) -> Callable[..., object]:
    def call(*arguments: object) -> object:
        return operator(*arguments)

    return torch.compile(call, fullgraph=True, dynamic=False)


def run(operator: Callable[..., object], *arguments: object) -> object:
    with keyed_caches():
        return compiled(operator)(*arguments)


def bits(rows: torch.Tensor) -> torch.Tensor:
    return rows.contiguous().view(torch.int16 if rows.element_size() == 2 else torch.int32)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_way_through_an_arena(shape: tuple[str, torch.dtype, int, int], isa: str) -> None:
    storage, dtype, key_dim, value_dim = shape
    rows = 400
    case = make_case(rows=rows, key_dim=key_dim, value_dim=value_dim, dtype=dtype)
    key, value = case.key, case.value
    key[0, 1, 7], value[0, 1, 7] = 0.0, -0.0
    batch, heads = key.shape[:2]
    layout = ArenaLayout(batch * heads, rows, key_dim, value_dim, STORAGES[storage], key.element_size())
    mine, reference = (torch.zeros(layout.total, dtype=torch.uint8) for _ in range(2))
    if STORAGES[storage].residual:
        key[0, 0, 5, 3], value[0, 0, 9, 1] = torch.inf, torch.nan

    # as a prompt and a token are written
    for part in (torch.arange(rows - 1), torch.arange(rows - 1, rows)):
        new = (key[:, :, part], value[:, :, part], part, rows, storage)
        ops.store_rows.default(reference, *new)
        run(ops.store_rows.default, mine, *new)
    for name in SECTIONS:
        assert torch.equal(*(getattr(arena_views(planes, layout), name) for planes in (mine, reference))), name

    few = torch.arange(2)
    call = (mine, key[:, :, 3:5], value[:, :, 3:5], few, rows, rows, storage)
    decoded, expected = run(ops.load_rows.default, *call), ops.load_rows.default(*call)
    for got, right in zip(decoded, expected, strict=True):
        if STORAGES[storage].residual:
            assert torch.equal(bits(got), bits(right))
        torch.testing.assert_close(got, right, rtol=2**-6, atol=1e-6, equal_nan=True)

    if STORAGES[storage].residual:
        key[0, 0, 5, 3], value[0, 0, 9, 1] = 0.0, 0.0
        ops.store_rows.default(mine, key, value, torch.arange(rows), rows, storage)
    check_read(case, mine, storage)


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # what the numbers of a head look like, from normal ones
    "normal": lambda x: x,
    "alike": lambda x: x.sign() * (1 + x.abs() / 8),  # few near zero: narrow fields, no escape
    "heavy tails": lambda x: x**3,
    "very heavy tails": lambda x: x**9,  # most are near zero: raw
    "mostly zeros": lambda x: torch.where(x > 1.2, x, 0.0),
    "zeros of both signs": lambda x: x.sign() * 0.0,
    "few values": lambda x: x.round(),
    "tiny": lambda x: x * 2.0**-99,
    "beyond the smallest scale": lambda x: x * 2.0**-110,
    "huge": lambda x: x * 2.0**96,
    "beyond the largest scale": lambda x: x * 2.0**101,
    "one outlier": lambda x: torch.cat([x[..., :1] * 1e4, x[..., 1:]], -1),
    "powers of two": lambda x: torch.exp2((x * 4).round()) * x.sign(),
}


@pytest.mark.parametrize("shape", [(64, 64), (13, 80), (136, 16)], ids=["64-64", "13-80", "136-16"])
def test_rows_of_all_kinds_come_back(shape: tuple[int, int], isa: str) -> None:
    """bfloat16 residuals of many widths, and raw rows: the reference's bytes, and the rows, to the last one of the arena."""
    generator = torch.Generator().manual_seed(0)
    rows = 32  # whole groups: the last row's residual ends the section
    heads = 2 * len(KINDS)
    made, normal = ([[torch.randn(rows, dim, generator=generator) for dim in shape] for _ in KINDS] for _ in range(2))
    made = [[make(x) for x in head] for make, head in zip(KINDS.values(), made, strict=True)]
    key = torch.stack([key for key, _ in made] + [key for key, _ in normal])[None].bfloat16()
    value = torch.stack([value for _, value in normal] + [value for _, value in made])[None].bfloat16()
    layout = ArenaLayout(heads, rows, *shape, STORAGES["lossless"], 2)
    mine, reference = (torch.zeros(layout.total, dtype=torch.uint8) for _ in range(2))
    new = (key, value, torch.arange(rows), rows, "lossless")
    ops.store_rows.default(reference, *new)
    run(ops.store_rows.default, mine, *new)
    for name in SECTIONS:
        assert torch.equal(*(getattr(arena_views(planes, layout), name) for planes in (mine, reference))), name
    views = arena_views(mine, layout)
    fields = views.residual[torch.isfinite(unpack_scales(views.scales)[0])]  # of rows that are not raw
    assert {*range(2, 7)} <= set((fields[:, 2] & 15).tolist()) | set((fields[:, 2] >> 4).tolist())
    few = torch.arange(2)
    decoded = run(ops.load_rows.default, mine, key[:, :, :2], value[:, :, :2], few, rows, rows, "lossless")
    for got, right in zip(decoded, (key, value), strict=True):
        assert torch.equal(bits(got), bits(right))


def check_read(case: Case, planes: torch.Tensor, storage: str) -> None:
    """The read's output and bytes, with fewer bits and with all of them."""
    counters = torch.zeros(2, len(COUNTER_FIELDS), dtype=torch.int64)
    heads, rows, value_dim = case.key.shape[1], case.key.shape[2], case.value.shape[3]
    for tolerance in (2.0, 0.0):
        arguments = (case.query, planes, None, None, heads, value_dim, case.key.dtype, storage, rows, rows)
        numbers = (case.factor, 0.0, tolerance, case.roundoff, 1)
        outputs = []
        for site, call in enumerate(
            (functools.partial(run, ops.packed_read_attention.counted), ops.packed_read_attention.counted)
        ):
            counters[site].zero_()
            outputs.append(call(*arguments, *numbers, counters, site))
        read = counters[:, COUNTER_FIELDS.index("bytes_read")].double()
        assert abs(float(read[0] / read[1]) - 1) < 0.02
        off = relative_errors(outputs[0], outputs[1].double()).max()
        assert off < (0.02 if storage != "lossless" else 4 * case.roundoff * max(tolerance, 1) + 1e-5)
        if storage == "lossless":
            assert relative_errors(outputs[0], exact(case)).max() < 8 * case.roundoff * max(tolerance, 1) + 1e-5


def test_a_row_outside_of_the_cache_is_an_error() -> None:
    case = make_case(rows=40)
    layout = ArenaLayout(case.key.shape[1], 30, 64, 64, STORAGES["8bit"])
    planes = torch.zeros(layout.total, dtype=torch.uint8)
    with pytest.raises((IndexError, RuntimeError), match="30 rows"):
        run(ops.store_rows.default, planes, case.key, case.value, torch.arange(40), 30, "8bit")
