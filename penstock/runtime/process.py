"""`HostProcess`: the front's handle on the host process.

Knows how to start it, to talk with it and to see it end; what is said is the supervisor's affair.
Starting needs no event loop, so that the host can import and load while the front is still
importing its own parts.
"""

import asyncio
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

from penstock.runtime.link import Link, ToFront, ToHost, link_pair
from penstock.runtime.processes import describe_code

HOST_MODULE = "penstock.cli.host"
LAST_LINES = 40

# Libraries read these when they are loaded. A waiting OpenMP team must sleep: with other processes
# on the same cores, spinning costs it forty times what it gains. And no library may start
# threads before the workers are forked; each worker sets its own number.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}


class HostProcess:
    """One host process. `watch` connects it to the running event loop."""

    def __init__(self, popen: "subprocess.Popen[bytes]", link: Link[ToFront], life_fd: int) -> None:
        assert popen.stdout is not None
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._popen = popen
        self._output = popen.stdout
        self._link = link
        self._life_fd = life_fd
        self._pid_fd = os.pidfd_open(popen.pid)
        self._partial_line = ""

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._popen.pid

    @classmethod
    def spawn(cls, folder: Path, module: str = HOST_MODULE) -> "HostProcess":
        """Start the process. It may outlive neither the calling thread nor this process."""
        link, host_socket = link_pair()
        # Nobody writes into this pipe: its end tells workers that the front is gone.
        front_fd, life_fd = os.pipe()
        environment = os.environ | ENVIRONMENT
        source = str(Path(__file__).parents[2])
        path = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{source}{os.pathsep}{path}" if path else source
        arguments = (host_socket.fileno(), front_fd, os.getpid(), folder)
        popen = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(host_socket.fileno(), front_fd),
            env=environment,
            process_group=0,
        )
        host_socket.close()
        os.close(front_fd)
        return cls(popen, link, life_fd)

    def watch(
        self,
        on_message: Callable[[ToFront], None],
        on_exit: Callable[[str], None],
        on_line: Callable[[str], None],
    ) -> None:
        """Call back on this loop for what the host says, for how it ended, and for every line that
        it or a worker wrote.
        """
        self._on_message, self._on_exit, self._on_line = on_message, on_exit, on_line
        self._loop = asyncio.get_running_loop()
        self._exited = self._loop.create_future()
        os.set_blocking(self._output.fileno(), False)
        self._loop.add_reader(self._link.fileno(), self._hear)
        self._loop.add_reader(self._output.fileno(), self._listen)
        self._loop.add_reader(self._pid_fd, self._reap)

    def send(self, message: ToHost) -> None:
        """Say something; a host that is gone does not hear it, and `on_exit` tells of that."""
        self._link.send(message)

    async def end(self, timeout_s: float) -> None:
        """Let the host end all workers and itself; kill it when that takes longer than `timeout_s`.

        `on_exit` is not called any more.
        """
        self._on_exit = lambda reason: None
        self._loop.remove_reader(self._link.fileno())
        self._link.close()
        os.close(self._life_fd)
        try:
            await asyncio.wait_for(asyncio.shield(self._exited), timeout_s)
        except TimeoutError:
            self._popen.kill()
            await self._exited

    def abort(self) -> None:
        """Kill a host that has never been watched, and wait for it."""
        self._link.close()
        os.close(self._life_fd)
        self._popen.kill()
        self._popen.wait()
        os.close(self._pid_fd)
        self._output.close()

    def _hear(self) -> None:
        message = self._link.receive()
        if message is None:
            self._loop.remove_reader(self._link.fileno())
        else:
            self._on_message(message)

    def _listen(self) -> None:
        try:
            chunk = os.read(self._output.fileno(), 65536)
        except BlockingIOError:
            return
        if not chunk:
            self._loop.remove_reader(self._output.fileno())
        text = self._partial_line + chunk.decode(errors="replace")
        *lines, self._partial_line = text.split("\n")
        self.last_lines.extend(lines)
        for line in lines:
            self._on_line(line)

    def _reap(self) -> None:
        """Take in everything that the host still said, and then its end."""
        self._loop.remove_reader(self._pid_fd)
        os.close(self._pid_fd)
        code = self._popen.wait()
        while self._link.fileno() >= 0 and (message := self._link.receive()) is not None:
            self._on_message(message)
        self._loop.remove_reader(self._output.fileno())
        self._listen()
        self._output.close()
        self._exited.set_result(None)
        self._on_exit(describe_code(code))
