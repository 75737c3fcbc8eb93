"""The loop of ``alignedkv top``."""

from __future__ import annotations

import time

from rich.console import Console
from rich.live import Live

from .render import render
from .scrape import Scrape, full_url, scrape
from .view import view


def show_once(url: str, console: Console) -> None:
    """Print one view of the process's whole life.

    Raises:
        EndpointError: there is nothing to show at ``url``.
    """
    console.print(render(view(scrape(url)), full_url(url)))


def show_live(url: str, interval: float, console: Console) -> None:
    """Show what happens from one scrape to the next, until the user interrupts.

    Args:
        interval: seconds between scrapes.

    Raises:
        EndpointError: there is nothing to show at ``url``, or no longer.
    """
    before: Scrape | None = None
    with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while True:
            now = scrape(url)
            live.update(render(view(now, before), full_url(url)), refresh=True)
            before = now
            time.sleep(interval)
