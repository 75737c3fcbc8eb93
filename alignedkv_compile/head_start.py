"""What Inductor finds out once per process about the C++ compiler, found out while Dynamo traces the first graph.

For which instruction sets the compiler builds, Inductor tries: with empty caches it compiles small programs, with full ones it
loads them in processes of their own. It comes to that when Dynamo has traced the graph, and until then only one core has work.
"""

from __future__ import annotations

import contextvars
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence

from . import torch_private

_log = logging.getLogger(__name__)

Task = Callable[[], object]


class HeadStart:
    """Tasks that are begun once, in a thread of its own, and done when whoever needs them has waited.

    Args:
        tasks: independent of each other, each keeping its result where those who need it look. After an exception they find
            out for themselves.
    """

    def __init__(self, tasks: Callable[[], Sequence[Task]]) -> None:
        self._tasks = tasks
        self._left: deque[Task] = deque()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Begin, where that has not happened yet."""
        if self._thread is None:
            self._left.extend(self._tasks())
            context = contextvars.copy_context()  # in which patched settings hold
            self._thread = threading.Thread(target=context.run, args=(self._work,), name="alignedkv-head-start", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Do what is left of the tasks that were begun, beside the thread, and return when it has ended."""
        if self._thread is not None:
            self._work()
            self._thread.join()

    def _work(self) -> None:
        while self._left:
            try:
                task = self._left.popleft()
            except IndexError:  # the other thread took it
                return
            try:
                task()
            except Exception as error:
                _log.debug("left to Inductor: %s: %s", type(error).__name__, error)


def install(backend: Callable[..., object]) -> HeadStart:
    """Have Dynamo begin when it first compiles for ``backend``, which has to wait before it calls Inductor."""
    head_start = HeadStart(torch_private.instruction_set_checks)

    def is_wanted() -> bool:
        # Another backend would not wait, and what Inductor keeps is not made for two threads that ask the same.
        announced, options = torch_private.announced_backend()
        return announced is backend and not torch_private.sets_cpp(options) and not torch_private.has_accelerator()

    def begin() -> None:
        try:
            if is_wanted():
                head_start.begin()
        except Exception as error:  # which would end a compilation, and those of other backends begin here, too
            _log.debug("no head start: %s: %s", type(error).__name__, error)

    # A compilation that never gets to its backend is waited for at its end: from there on, others may call Inductor.
    torch_private.around_compilations(begin, head_start.wait)
    return head_start
