"""SIGINT and SIGTERM: a run finishes its step and saves before it stops."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class StopSignals:
    """Notes the first SIGINT or SIGTERM instead of dying; a second one is obeyed at once, as before `listen`.

    Attributes:
        received: number of the signal that was noted, or None.
    """

    def __init__(self, on_first: Callable[[str], None]):
        self.received: int | None = None
        self._on_first = on_first
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def listen(self) -> None:
        """Take the signals over; elsewhere than in the main thread, which alone may, do nothing."""
        self.received, self._process = None, os.getpid()  # of a part of the run that is over
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore(self) -> None:
        """Give the signals back."""
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler or signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # forked, by a reward function for example: the signal is to end this one
            self.restore()
            os.kill(os.getpid(), number)
            return
        self.received = number
        self.restore()
        self._on_first(signal.Signals(number).name)
