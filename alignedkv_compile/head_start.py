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
