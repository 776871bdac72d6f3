"""Processes that tests start and kill."""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# Children are forked from a server that has imported already what takes seconds (torch._dynamo comes with the first use
# of an optimiser).
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["taurl.llm.algorithms.grpo", "taurl.control", "torch._dynamo", "tensorboard.summary.writer.record_writer"]
)


class Child:
    """A process that runs a function; its exit code and what it prints are what a command line's would be."""

    def __init__(self, function: Callable[..., None], *arguments: Any):
        self.said, writes = CONTEXT.Pipe(duplex=False)  # a pipe, which no limit on files stops
        self.process = CONTEXT.Process(target=_child, args=(writes, function, arguments), daemon=True)
        self.process.start()
        writes.close()
        self.heard = b""

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait_for(self, text: str, timeout: float = 300) -> None:
        """Wait until it has printed this."""
        self._listen(timeout, lambda: text.encode() in self.heard)
        assert text.encode() in self.heard, f"it ended without {text!r}: {self.heard.decode()}"

    def wait(self, timeout: float = 300) -> tuple[int, str]:
        """Wait for its end. Returns: exit code and all that it has printed."""
        self._listen(timeout, lambda: False)  # until the process ends: one that waits for a full pipe would not
        self.process.join()
        return self.process.exitcode, self.heard.decode()

    def _listen(self, timeout: float, enough: Callable[[], bool]) -> None:
        late = threading.Timer(timeout, self.process.kill)
        late.start()
        while not enough() and (more := os.read(self.said.fileno(), 65536)):
            self.heard += more
        assert late.is_alive(), f"still running after {timeout} s"
        late.cancel()


def _child(writes: Connection, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    for stream in (1, 2):
        os.dup2(writes.fileno(), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    code = 0
    try:
        function(*arguments)
    except SystemExit as exit:
        code = exit.code
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        code = getattr(error, "exit_code", 99)
        print(f"taurl: {error}", file=sys.stderr) if code != 99 else traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
