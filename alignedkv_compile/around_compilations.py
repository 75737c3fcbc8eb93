"""What is done around every compilation of the backend's, from the moment that Dynamo begins to trace."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable

from . import torch_private
from .head_start import HeadStart

_log = logging.getLogger(__name__)


class CollectorPause:
    """Python's collector of cycles does not run between :meth:`begin` and :meth:`end`, where it would have.

    A trace allocates some hundred thousand objects. Most of them stay, and whenever those that stay have become a quarter more
    the collector looks through every object of the process.
    """

    def __init__(self) -> None:
        self._paused = False

    def begin(self) -> None:
        """Pause; nothing happens where the collector is off already."""
        if gc.isenabled():
            gc.disable()
            self._paused = True

    def end(self) -> None:
        """Collect what was allocated since :meth:`begin`, once, and undo what that did."""
        if not self._paused:
            return
        self._paused = False
        gc.collect(generation=0)
        if gc.get_freeze_count() == 0:  # else unfreezing would undo what the user did
            # What is left is old from now on and not counted as new, or all objects were looked through at the next occasion.
            gc.freeze()
            gc.unfreeze()
        gc.enable()


def install(backend: Callable[..., object]) -> HeadStart:
    """Have Dynamo begin when it compiles for ``backend``, which has to wait for what is returned before it calls Inductor."""
    pause, head_start = CollectorPause(), HeadStart(torch_private.instruction_set_checks)

    def begin() -> None:
        try:
            announced, options = torch_private.announced_backend()
            # Another backend would not wait, and what Inductor keeps is not made for two threads that ask the same.
            if announced is not backend:
                return
            pause.begin()
            if not torch_private.sets_cpp(options) and not torch_private.has_accelerator():
                head_start.begin()
        except Exception as error:  # which would end a compilation, and those of other backends begin here, too
            _log.debug("nothing is done around the compilation: %s: %s", type(error).__name__, error)

    def end() -> None:
        pause.end()
        head_start.wait()  # for a compilation that never gets to its backend: from here on, others may call Inductor

    torch_private.around_compilations(begin, end)
    return head_start
