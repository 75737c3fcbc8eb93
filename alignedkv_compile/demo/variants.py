"""The ways of running the model that the demo compares."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

EAGER, COMPILED, ALIGNED = "eager", "torch.compile", "alignedkv"


@dataclass(frozen=True)
class Variant:
    """One way of running the model.

    Attributes:
        name: what to call it in tables; :data:`EAGER`, :data:`COMPILED` or :data:`ALIGNED`.
        call: the model or its compiled form.
        cache_dir: Inductor's on-disk cache while this variant runs, its own so that none profits from what another
            compiled before; None for eager.
    """

    name: str
    call: Callable[..., Any]
    cache_dir: str | None = None

    @torch.no_grad()
    def decode(self, token: torch.Tensor, cache: Any) -> torch.Tensor:
        """Logits ``[1, vocabulary]`` of the token after ``token [1, 1]``; ``cache`` grows by one row."""
        token = token.new_tensor(token.tolist())  # a slice of the document has other strides, for which Dynamo recompiles
        logits: torch.Tensor = self.call(input_ids=token, past_key_values=cache).logits
        return logits[:, -1]

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """While open, Inductor writes to this variant's own cache folder."""
        if self.cache_dir is None:
            yield
            return
        before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = self.cache_dir
        try:
            yield
        finally:
            if before is None:
                os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
            else:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


@contextmanager
def stock_and_aligned(model: Any, options: Mapping[str, object]) -> Iterator[tuple[Variant, ...]]:
    """Eager, ``torch.compile(model)`` and ``torch.compile(model, backend="alignedkv", options=options)``.

    Both compiled forms start from empty caches, which are removed at the end.
    """
    with tempfile.TemporaryDirectory(prefix="alignedkv-demo-", ignore_cleanup_errors=True) as folder:
        yield (
            Variant(EAGER, model),
            Variant(COMPILED, torch.compile(model), os.path.join(folder, "stock")),
            Variant(
                ALIGNED,
                torch.compile(model, backend="alignedkv", options=dict[str, Any](options)),
                os.path.join(folder, "aligned"),
            ),
        )


def warm_up_compiler() -> None:
    """Compile a trivial function, so that what happens once per machine or process (precompiled C++ headers, imports, the
    compiler's own start) is in nobody's time to first token."""
    with torch.no_grad():
        torch.compile(lambda x: torch.softmax(x, -1) + 1)(torch.randn(4, 64, dtype=torch.bfloat16))
