"""`penstock` in a terminal of its own, for tests: typed at, read, and never left behind."""

import os
import pty
import select
import subprocess
import sys
import time
from contextlib import suppress

from tests.cli.server import ROOT

# A session of its own has no terminal yet; only its leader can take one.
_TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "penstock", *sys.argv[1:]])
"""


class Terminal:
    """A terminal of 120 columns with `penstock` and `arguments` in it."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._fd, inner = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _TAKE_TERMINAL, *arguments],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
            | environment,
        )
        os.close(inner)
        self._unread = b""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def read_until(self, word: str, timeout_s: float = 30) -> str:
        """Return what was shown up to and including `word`."""
        deadline = time.monotonic() + timeout_s
        while word.encode() not in self._unread:
            assert time.monotonic() < deadline, self._unread.decode()
            self._read(0.1)
        shown, found, self._unread = self._unread.partition(word.encode())
        return (shown + found).decode()

    def end(self, timeout_s: float = 20) -> int:
        """Wait for the end; return the exit code."""
        deadline = time.monotonic() + timeout_s
        while (code := self.process.poll()) is None:
            assert time.monotonic() < deadline, self._unread.decode()
            self._read(0.05)
        return code

    def _read(self, timeout_s: float) -> None:
        if select.select([self._fd], [], [], timeout_s)[0]:
            # Nobody at the other end any more is an error of a terminal, not its end.
            with suppress(OSError):
                self._unread += os.read(self._fd, 4096)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)
