"""The capacity table in the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from .memory import format_memory
from .result import Capacity, Fit


def print_capacity(capacity: Capacity, console: Console) -> None:
    """Print one row per way to store the cache."""
    table = Table(title=_title(capacity), caption=_caption(capacity), box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("storage", no_wrap=True)
    for head in ("tokens", "× stock", "held"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("what")
    for fit in capacity.fits:
        ratio = "" if fit.over_stock is None else f"{fit.over_stock:.2f}"
        table.add_row(fit.storage, _tokens(fit), ratio, format_memory(fit.held), fit.what)
    console.print(table, highlight=False)


def _title(capacity: Capacity) -> str:
    sequences = "one sequence" if capacity.batch == 1 else f"each of {capacity.batch} sequences"
    return f"{capacity.model}, {capacity.dtype}: tokens of {sequences} that fit into {format_memory(capacity.memory)}"


def _caption(capacity: Capacity) -> str:
    weights = f"{format_memory(capacity.weights)} of weights included." if capacity.weights else "For the cache alone."
    made_for = f" The model was made for {capacity.positions} tokens." if capacity.positions else ""
    return f"{weights}{made_for} Layers that are not full attention are counted as they are."


def _tokens(fit: Fit) -> str:
    return "any number" if fit.tokens is None else f"{fit.tokens:,}"
