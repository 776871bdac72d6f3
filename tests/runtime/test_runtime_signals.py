"""Signals while a run listens, of this process and of those it forks."""

import os
import signal
import time

import pytest

from taurl.runtime.signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_forked_child_ends_that(number):
    own = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    found = signal.signal(number, own)  # what a shell starts in the background ignores SIGINT
    noted = []
    signals = StopSignals(noted.append)
    signals.listen()
    try:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:  # as multiprocessing makes one for a reward function
            try:
                os.write(write, b"here")  # Python drops what comes before it has begun here
                time.sleep(60)
            except KeyboardInterrupt:
                os._exit(7)
            finally:
                os._exit(8)
        os.read(read, 4)
        os.kill(child, number)
        _, status = os.waitpid(child, 0)
        # SIGINT is Python's KeyboardInterrupt there, which ends the sleep.
        assert os.WTERMSIG(status) == number if number == signal.SIGTERM else os.waitstatus_to_exitcode(status) == 7
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received == number
        assert noted == [signal.Signals(number).name]
    finally:
        signals.restore()
        restored = signal.signal(number, found)
    assert restored == own
