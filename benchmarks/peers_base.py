"""What a peer is: something that runs one layer's decode step over a cache of its own. The benchmark knows no more of it.

opening = peer.open(shape, dtype)     # compile for these heads; may refuse
copy = opening(prepared)              # a layer's numbers as this peer stores them; may refuse
copy.output()                         # once, to be checked against float64
copy.run()                            # what is timed
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType

import torch

from alignedkv_compile.errors import AlignedKVError
from attention_inputs import Shape
from attention_variants import Prepared


class PeerRefusalError(AlignedKVError, RuntimeError):
    """A peer that is not installed or cannot run what is asked; the message says why, and becomes the peer's row."""


@dataclass(frozen=True)
class Copy:
    """One copy of a layer, as a peer holds it.

    Attributes:
        run: one decode step, by the cheapest call that the peer's Python interface has; its value is not looked at.
        output: one decode step, and what came out: ``[1, Hq, 1, D]``, any floating-point dtype.
        nbytes: of K and V as they are stored, which one step reads (at most).
        rest: sends the peer's threads to sleep after a turn, where they would look for work for long.
    """

    run: Callable[[], object]
    output: Callable[[], torch.Tensor]
    nbytes: int
    rest: Callable[[], object] = lambda: None


Opening = Callable[[Prepared], Copy]
"""Makes a copy of a layer of the heads and dtype that it was opened for, at any context."""


@dataclass(frozen=True)
class Peer:
    """One row of the table.

    Attributes:
        name: library and what the cache is stored in.
        description: what exactly is called.
        open: gets the peer ready for a shape and the dtype of the layer's tensors. It may raise, and so may what it returns.
        package: the distribution whose version belongs to the figures, "" for torch itself.
    """

    name: str
    description: str
    open: Callable[[Shape, torch.dtype], Opening]
    package: str = ""


def require(module: str, package: str) -> ModuleType:
    """Import what a peer needs.

    Raises:
        PeerRefusalError: it is not installed.
    """
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise PeerRefusalError(f"{package} is not installed; the extra `peers` has it")
    return importlib.import_module(module)


def version(package: str) -> str:
    """Of an installed distribution, "" when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
