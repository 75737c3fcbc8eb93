"""The errors a user of ``backend="alignedkv"`` can meet: one small class, one message each.

Dynamo wraps whatever a backend raises while compiling in ``torch._dynamo.exc.BackendCompilerFailed``, whose message ends with
ours and whose ``inner_exception`` is the object defined here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class AlignedKVError(Exception):
    """Base of every error that this package raises on purpose."""


def _suggest(name: str, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(allowed), n=3)
    return f" Did you mean {' or '.join(repr(match) for match in close)}?" if close else ""


class UnknownOptionError(AlignedKVError, TypeError):
    """``options`` (or the backend's keyword arguments) holds a name that does not exist."""

    def __init__(self, name: str, value: object, allowed: Sequence[str]) -> None:
        super().__init__(
            f"unknown option {name!r} (given {value!r}); the options of backend 'alignedkv' are {', '.join(allowed)}."
            + _suggest(name, allowed)
        )


class OptionValueError(AlignedKVError, ValueError):
    """An option has a value outside of what is allowed."""

    def __init__(self, name: str, value: object, allowed: str) -> None:
        super().__init__(f"option {name!r} is {value!r}; allowed: {allowed}.")


class UnknownModeError(AlignedKVError, ValueError):
    """``mode`` is not one of Inductor's modes, or is one that would bypass this backend's kernels ("lite")."""

    def __init__(self, mode: object, allowed: Sequence[str]) -> None:
        super().__init__(
            f"mode is {mode!r}; allowed: None, {', '.join(repr(name) for name in allowed)}." + _suggest(str(mode), allowed)
        )


class UnknownInductorOptionError(AlignedKVError, ValueError):
    """The option ``inductor`` names a config entry that Inductor does not have."""

    def __init__(self, name: object, value: object, allowed: Iterable[str]) -> None:
        super().__init__(
            f"option 'inductor' sets {name!r} to {value!r}, but torch._inductor.config has no such entry; allowed: the names"
            f" of torch._inductor.list_options()." + _suggest(str(name), allowed)
        )


class DeclinedError(AlignedKVError, RuntimeError):
    """``strict=True`` and an attention site over a KV cache cannot be rewritten.

    Attributes:
        sites: one line of text per declined site, with its reason.
        links: the sections of the documentation about these reasons.
    """

    def __init__(self, sites: Sequence[str], links: Sequence[str] = ()) -> None:
        self.sites = tuple(sites)
        self.links = tuple(links)
        lines = "".join(f"\n  {line}" for line in self.sites)
        pointer = f"\nwhat that means, and what to do: {', '.join(self.links)}" if self.links else ""
        super().__init__(f"strict=True and {len(self.sites)} cached attention site(s) were declined:{lines}{pointer}")


class StatisticsDisabledError(AlignedKVError, RuntimeError):
    """``stats()`` was asked for, but no compiled graph collects statistics."""

    def __init__(self) -> None:
        super().__init__(
            "no graph that collects read statistics has been compiled (or none is alive): pass options={'stats': True} to"
            " torch.compile(..., backend='alignedkv') and run the compiled model once before calling stats()."
        )


class CacheTypeError(AlignedKVError, TypeError):
    """``compact()`` was given something that is no cache."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"compact() takes a cache of transformers, whose layers are a list under `.layers`; a {name} has none. Pass what"
            " the model takes as `past_key_values`."
        )


class CacheRowsError(AlignedKVError, ValueError):
    """``alignedkv_compile.Cache`` was given rows that it cannot hold."""

    def __init__(self, met: str) -> None:
        super().__init__(f"alignedkv_compile.Cache was given {met}.")


class CacheLengthError(AlignedKVError, RuntimeError):
    """A layer's past K and V differ in length, where ``cat`` and attention would have failed too."""

    def __init__(self, key_length: int, value_length: int) -> None:
        super().__init__(f"the past keys have {key_length} rows but the past values have {value_length}")


class CacheTooLongError(AlignedKVError, RuntimeError):
    """A cache has outgrown what its compiled code can address."""

    def __init__(self, capacity: int, largest: int) -> None:
        super().__init__(f"a growing cache of {capacity} rows was needed, but this compiled code addresses {largest} at most")


class GraphVerificationError(AlignedKVError, RuntimeError):
    """The rewritten graph is not what the records say: a defect of the passes, never of the user's model."""
