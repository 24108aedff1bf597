"""An end that a command does not pass, whatever hangs."""

import os
import threading
import time
from collections.abc import Callable

OVERRUN = 3
"""Exit status of a command that was ended."""


class Deadline:
    """Says whether there is time for more, and ends the process when the time is up.

    A kernel that never comes back cannot be interrupted from Python; the process can end.
    """

    def __init__(self, seconds: float | None, on_timeout: Callable[[], None]):
        """Begins.

        Args:
            seconds: from now; None for no end.
            last_words: called before the process is ended, on another thread.
        """
        self._end = None if seconds is None else time.monotonic() + seconds
        self._last_words = on_timeout
        self._timer = None
        if seconds is not None:
            self._timer = threading.Timer(seconds, self._stop)
            self._timer.daemon = True
            self._timer.start()

    def leaves(self, seconds: float) -> bool:
        """Whether that much time is left."""
        return self._end is None or time.monotonic() + seconds < self._end

    def cancel(self) -> None:
        """What had to be done is done."""
        if self._timer is not None:
            self._timer.cancel()

    def _stop(self) -> None:
        try:
            self._last_words()
        finally:
            os._exit(OVERRUN)
