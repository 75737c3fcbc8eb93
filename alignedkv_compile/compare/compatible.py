"""Whether runs may be compared at all: the same kind, the same settings, and for times the same machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..run_file import Kind, RunFile
from .errors import ComparisonError

MACHINE = ("cpu", "capability", "kernels", "threads", "cores")
"""Entries of the environment on which times depend; an older file may lack one."""
_SETTINGS: Mapping[Kind, tuple[str, ...]] = {
    Kind.DEMO: ("model", "document", "settings"),
    Kind.ATTENTION: ("plan",),
    Kind.PEERS: ("settings",),
    Kind.EVAL: ("model", "text_sha256", "settings"),
    Kind.CACHES: ("model", "text_sha256", "settings"),
    Kind.MODELS: ("settings",),
}
"""Entries of each kind of file that say what was run."""


def require_comparable(runs: Sequence[RunFile], *, across_machines: bool) -> None:
    """Refuse runs that are not of one kind, or not of the same settings, or not of one machine.

    Args:
        runs: all files, old and new.
        across_machines: allow different machines.

    Raises:
        ComparisonError: with every difference to the first file.
    """
    first, *others = runs
    for other in others:
        pair = f"{str(first.path)!r} and {str(other.path)!r}"
        if other.kind is not first.kind:
            raise ComparisonError(f"{pair} are of different kinds: `{first.kind.value}` and `{other.kind.value}`")
        names = _SETTINGS[first.kind]
        settings, others_settings = ({name: run.data.get(name) for name in names} for run in (first, other))
        found = list(_differences(settings, others_settings))
        if found:
            raise ComparisonError(f"{pair} were made with different settings: {'; '.join(found)}")
        found = list(_differences(_machine(first), _machine(other)))
        if found and not across_machines:
            raise ComparisonError(
                f"{pair} are from different machines: {'; '.join(found)}. With --across-machines bytes and quality are"
                " compared, and times are shown only"
            )


def same_machine(runs: Sequence[RunFile]) -> bool:
    """Whether times of these runs can be compared."""
    return not any(list(_differences(_machine(runs[0]), _machine(run))) for run in runs[1:])


def version_changes(old: RunFile, new: RunFile) -> list[str]:
    """Packages, and the interpreter, whose version differs: not refused, since this is what one may want to compare."""
    before, after = ({"Python": run.environment.get("python"), **run.environment.get("packages", {})} for run in (old, new))
    return [f"{name} {before[name]} -> {after[name]}" for name in before if name in after and before[name] != after[name]]


def _machine(run: RunFile) -> dict[str, Any]:
    return {name: run.environment.get(name) for name in MACHINE}


def _differences(left: Any, right: Any, path: str = "") -> Iterator[str]:
    """Leaves that differ. In the environment None differs from nothing: an older file does not record everything."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        for name in {**left, **right}:
            yield from _differences(left.get(name), right.get(name), f"{path}.{name}" if path else str(name))
    elif left != right and not (path in MACHINE and None in (left, right)):
        yield f"{path} is {left!r} and {right!r}"
