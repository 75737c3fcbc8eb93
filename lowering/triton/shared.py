"""The functions that all kernels share, with what they take from the layout and the error model printed into them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import jinja2

from ... import layout, precision, residual, residual_fields
from ...layout import MAX_HEAD_DIM, ArenaLayout
from ...residual import block_gain
from ...storage import WINDOW, Storage
from ..constants import SHARED, print_triton

SECTIONS = ("scales", "value_sum", "key_hi", "key_mid", "value_hi", "value_mid", "residual", "turns")


@dataclass(frozen=True)
class Text:
    """A Triton expression that arithmetic extends; what :class:`ArenaLayout` returns for sizes known only at run time."""

    text: str

    def __add__(self, other: object) -> Text:
        return Text(f"({self.text} + {other})")

    def __radd__(self, other: object) -> Text:
        return Text(f"({other} + {self.text})")

    def __mul__(self, other: object) -> Text:
        return Text(f"({self.text} * {other})")

    def __floordiv__(self, other: object) -> Text:
        return Text(f"({self.text} // {other})")

    def __str__(self) -> str:
        return self.text


class TextLayout(ArenaLayout):
    """The arena's layout with the bytes of a row and a record as names too."""

    key_plane_row = Text("KH")  # type: ignore[assignment]
    value_plane_row = Text("VH")  # type: ignore[assignment]
    block_record = Text("RECORD")  # type: ignore[assignment]
    residual_row = Text("RESIDUAL")  # type: ignore[assignment]


def _section_functions(storage: Storage) -> str:
    arena = TextLayout(Text("pairs"), Text("capacity"), 0, 0, storage)  # type: ignore[arg-type]
    sizes = ", ".join(f"{name}: tl.constexpr" for name in ("KH", "VH", "RECORD", "RESIDUAL"))
    functions = [
        f"@triton.jit\ndef arena_{name}(pairs, capacity, {sizes}):\n"
        f'    """Byte offset of the section {name}."""\n    return {getattr(arena, name)}\n'
        for name in SECTIONS
    ]
    functions += [
        f"@triton.jit\ndef arena_{name}(capacity):\n    return {getattr(arena, name)}\n"
        for name in ("rows", "blocks", "mid_rows")
    ]
    return "\n\n".join(functions)


def _formulas() -> str:
    print_function = precision.print_triton_function
    return "\n\n\n".join(
        [
            print_function("error_budget", "budget", ("R",), ("alpha", "u")),
            print_function("skip_threshold", "skip_threshold", ("B", "N", "P_v", "n", "theta_4")),
            print_function("addend_sum", "addend_sum", ("P_sK", "P_sKv", "P_sV", "R", "q"), ("D",)),
            print_function("threshold", "threshold", ("B", "E", "N")),
            print_function("remaining_budget", "remaining_budget", ("B", "left")),
            print_function("key_coefficient_4", "key_coefficient", ("q",), values={"b": 4}),
            print_function("weight_error_factor", "weight_error_factor", ("x",), double=False),
        ]
    )


@functools.cache
def shared_functions(storage: Storage) -> str:
    """Text of the templates of functions, for arenas of this storage."""
    folder = Path(__file__).parent / "templates"
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(folder), undefined=jinja2.StrictUndefined)
    values = {
        "formulas": _formulas(),
        "sections": _section_functions(storage),
        "storage": storage,
        "WINDOW": WINDOW,
        "gains": [(1 << bit, block_gain(1 << bit)) for bit in range(MAX_HEAD_DIM.bit_length())],
        "fields": residual_fields,
        "residual": residual,
        "layout": layout,
    }
    names = ("functions", "stream_functions", *(("residual_functions",) if storage.residual else ()))
    texts = [environment.get_template(f"{name}.py.jinja") for name in names]
    return "\n\n\n".join(text.render(**print_triton(SHARED), **values) for text in texts)
