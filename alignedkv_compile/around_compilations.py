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

    A trace allocates some hundred thousand objects, nearly all of which stay, and each time that their number has grown by a
    quarter the collector looks through every object of the process.
    """

    def __init__(self) -> None:
        self._paused = False

    def begin(self) -> None:
        """Pause; nothing happens where the collector is off already."""
        if gc.isenabled():
            gc.disable()
            self._paused = True

    def end(self) -> None:
        """Undo what :meth:`begin` did."""
        if self._paused:
            self._paused = False
            gc.enable()


def install(backend: Callable[..., object]) -> HeadStart:
    """Have Dynamo begin when it compiles for ``backend``, which has to wait for what is returned before it calls Inductor."""
    pause, head_start = CollectorPause(), HeadStart(torch_private.instruction_set_checks)

    def begin() -> None:
        try:
            announced, options = torch_private.announced_backend()
            if (
                announced is not backend
            ):  # which would not wait, and what Inductor keeps is not made for two threads that ask the same
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
