"""What several commands read from the command line."""

from __future__ import annotations

import typer


def positive_list(text: str) -> tuple[int, ...]:
    """Numbers of tokens such as ``"2048,7936"``, sorted.

    Raises:
        typer.BadParameter: it is no such list.
    """
    try:
        values = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 2048,7936") from None
    if values[0] < 1:
        raise typer.BadParameter(f"{values[0]} is not a positive number of tokens")
    return values
