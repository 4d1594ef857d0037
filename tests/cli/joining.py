"""A `penstock worker` of its own process, for tests: started, watched, and never left behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cli.server import ROOT, Server, wait_for

KEY = "a key for these tests alone"
PULSE = ("--heartbeat-interval", "0.1", "--lost-after", "1.5")


class Joined:
    """A joined host. `text` is everything that it has said on stderr so far."""

    def __init__(self, *arguments: str, port: int, folder: Path, key: str = KEY) -> None:
        self.log = folder / f"worker-{len(list(folder.glob('worker-*')))}"
        environment = os.environ | {
            "XDG_RUNTIME_DIR": str(folder),
            "PYTHONPATH": str(ROOT),
            "PENSTOCK_CLUSTER_KEY": key,
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "penstock", "worker"),
                    *("--join", f"127.0.0.1:{port}", *PULSE, *arguments),
                ],
                stderr=log,
                env=environment,
                process_group=0,
            )

    @property
    def text(self) -> str:
        return self.log.read_text()

    def wait_until_in(self, count: int = 1) -> None:
        self.wait_for(lambda: self.text.count("has joined") >= count)

    def wait_for(self, condition, timeout_s: float = 30) -> None:
        def told() -> bool:
            assert self.process.poll() is None, self.text
            return condition()

        wait_for(told, lambda: self.text, timeout_s)

    def interrupt(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self, timeout_s: float = 20) -> int:
        return self.process.wait(timeout_s)


@contextmanager
def joining(*arguments: str, port: int, folder: Path, key: str = KEY) -> Iterator[Joined]:
    """Have workers of another process join for as long as the block."""
    joined = Joined(*arguments, port=port, folder=folder, key=key)
    try:
        yield joined
    finally:
        joined.process.kill()
        joined.process.wait()


def workers_of(server: Server) -> dict[str, str]:
    """Return the workers that serve, with their roles."""
    return {worker["id"]: worker["role"] for worker in server.get("/cluster")[1]["workers"]}
