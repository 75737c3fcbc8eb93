"""Hypothesis strategies for attention calls over a KV cache: shapes, dtypes, masks and values that are hard for a policy.

A call is described by a small frozen :class:`Recipe`, which is what Hypothesis shrinks and prints; :meth:`Recipe.case` makes
the tensors. A counterexample is a recipe, and becomes a named regression test by pasting its ``repr``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from cases import Case
from hypothesis import strategies as st

VALUES = (
    "normal",
    "clusters",
    "repeated rows",
    "all equal",
    "sink",
    "dominant token",
    "outlier channel",
    "heavy tails",
    "ties",
    "zeros",
    "denormals",
    "tiny",
    "huge",
    "one huge row",
    "large mean",
)
"""Kinds of K and V. All are finite and leave attention itself well inside float32."""

COHERENT = {"clusters": 4.0, "repeated rows": 3.0}
"""Kinds whose rows share errors, and a bound on added rms error over tolerance that the settings of test_promise.py keep."""

SPECIALS = ("nan key", "inf key", "nan value", "inf value", "nan query")
MASKS = ("none", "causal", "padding", "sparse", "window", "bias")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Recipe:
    """One call, reproducible from its fields.

    ``rows`` may be 0, and ``key_dim`` and ``value_dim`` need not be powers of two or multiples of 16.
    """

    heads: int = 1
    group: int = 1
    query_rows: int = 1
    rows: int = 300
    key_dim: int = 32
    value_dim: int = 32
    dtype: torch.dtype = torch.bfloat16
    values: str = "normal"
    mask: str = "none"
    peak: float = 2.0
    tolerance: float = 2.0
    seed: int = 0
    unit_roundoff: float | None = None

    def case(self) -> Case:
        """The call's tensors."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        shape = (1, self.heads, self.rows)
        key, value = _fill(self.values, normal(*shape, self.key_dim), normal(*shape, self.value_dim), generator)
        limit = torch.finfo(self.dtype).max / 4
        query = normal(1, self.heads * self.group, self.query_rows, self.key_dim) * self.peak
        unit = self.unit_roundoff
        if self.dtype == torch.float32 and unit is None:
            unit = 2.0**-11  # at its own precision nothing is ever skipped
        return Case(
            query=query.to(torch.bfloat16).float(),
            key=key.clamp(-limit, limit).to(self.dtype),
            value=value.clamp(-limit, limit).to(self.dtype),
            mask=_mask(self.mask, self.query_rows, self.rows, generator),
            tolerance=self.tolerance,
            unit_roundoff=unit,
        )


def _fill(kind: str, key: torch.Tensor, value: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    rows = key.shape[2]
    if rows == 0:
        return key, value
    if kind == "clusters":  # few distinct tokens, as in the first layer
        which = torch.randint(min(rows, 7), (rows,), generator=generator)
        return key[:, :, which], value[:, :, which]
    if kind == "repeated rows":
        return key[:, :, :1].expand_as(key).clone(), value[:, :, :1].expand_as(value).clone()
    if kind == "all equal":
        return torch.full_like(key, 0.7), torch.full_like(value, -1.3)
    if kind == "sink":
        key[:, :, 0] *= 4
        value[:, :, 0] /= 64
    elif kind == "dominant token":
        key[:, :, rows // 3] *= 6
    elif kind == "outlier channel":
        key[..., 0] += 20
        value[..., -1] *= 30
    elif kind == "heavy tails":
        return key * key.abs().square(), value * value.abs().square()
    elif kind == "ties":
        return key.round(), value.round()
    elif kind == "zeros":
        key[:, :, ::2] = 0
        value[:, :, 1::3] = 0
    elif kind == "denormals":
        value *= 2.0**-20
        value[:, :, ::2] *= 2.0**-110
    elif kind == "tiny":
        value *= 2.0**-14
    elif kind == "huge":
        value *= 2.0**12
    elif kind == "one huge row":
        value[:, :, rows // 2] *= 1000
    elif kind == "large mean":
        value += 5.0
    return key, value


def _mask(kind: str, query_rows: int, rows: int, generator: torch.Generator) -> torch.Tensor | None:
    """``[1, 1, Q, rows]``; every query row attends to at least one row."""
    if kind == "none" or rows == 0:
        return None
    position = torch.arange(rows)
    last = torch.arange(rows - query_rows, rows).clamp_min(0)[:, None]
    causal = position <= last
    if kind == "padding":
        causal = causal & (position >= rows // 4) | (position == last)
    elif kind == "window":
        causal = causal & (position > last - max(rows // 3, 1))
    elif kind == "sparse":
        causal = (torch.rand(query_rows, rows, generator=generator) < 0.3) | (position == last)
    elif kind == "bias":
        bias = torch.randn(query_rows, rows, generator=generator)
        return bias.masked_fill(~causal, -math.inf)[None, None]
    return causal[None, None]


def with_special(case: Case, kind: str) -> Case:
    """The same call with one NaN or Inf at a row that is attended by every query row of an unmasked call."""
    number = math.nan if kind.startswith("nan") else math.inf
    where = kind.split()[1]
    tensor = {"key": case.key, "value": case.value, "query": case.query}[where].clone()
    tensor[0, -1, -1 if where == "query" else tensor.shape[2] // 2, 1] = number
    return replace(case, **{where: tensor})


def recipes(
    *,
    max_rows: int = 400,
    values: tuple[str, ...] = VALUES,
    masks: tuple[str, ...] = MASKS,
    tolerances: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 16.0),
) -> st.SearchStrategy[Recipe]:
    """Calls of GQA 1 to 16, head dimensions 8 to 256, odd lengths, 1 to 4 query rows."""
    dims = st.sampled_from((8, 9, 16, 21, 32, 48, 64, 80, 96, 128, 256))
    return st.builds(
        Recipe,
        heads=st.sampled_from((1, 1, 2, 3)),
        group=st.sampled_from((1, 1, 2, 3, 4, 7, 16)),
        query_rows=st.sampled_from((1, 1, 1, 2, 4)),
        rows=st.one_of(st.integers(1, 40), st.integers(1, max_rows), st.sampled_from((127, 128, 129, 256))),
        key_dim=dims,
        value_dim=dims,
        dtype=st.sampled_from(DTYPES),
        values=st.sampled_from(values),
        mask=st.sampled_from(masks),
        peak=st.sampled_from((0.0, 0.3, 1.0, 2.0, 5.0, 12.0)),
        tolerance=st.sampled_from(tolerances),
        seed=st.integers(0, 2**31),
    )
