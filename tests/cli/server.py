"""A `penstock serve` of its own process, for tests: started, watched, and never left behind."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def wait_for(
    condition: Callable[[], object], text: Callable[[], str], timeout_s: float = 30
) -> None:
    """Wait until `condition` holds; fail with `text` when it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, text()
        time.sleep(0.01)


class Server:
    """A running server. `lines` is everything that it has said on stderr once it has ended."""

    def __init__(self, *arguments: str, port: int, folder: Path) -> None:
        self.port = port
        self.folder = folder
        self.log = folder / "stderr"
        environment = os.environ | {"XDG_RUNTIME_DIR": str(folder), "PYTHONPATH": str(ROOT)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "penstock", "serve", "--port", str(port), *arguments],
                stderr=log,
                env=environment,
                # As a shell would: a signal to the group reaches the front and nobody else's.
                process_group=0,
            )

    @property
    def text(self) -> str:
        return self.log.read_text()

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        return self._call("GET", path, None, headers)

    def post(self, path: str, body: dict[str, object], **headers: str) -> tuple[int, Any]:
        return self._call("POST", path, body, headers)

    def complete(self, num_tokens: int, **more: object) -> tuple[int, Any]:
        body = {"prompt": "Once upon a time", "max_tokens": num_tokens, "seed": 1}
        return self.post("/v1/completions", body | more)

    def wait_until_up(self, timeout_s: float = 60) -> None:
        self.wait_for(lambda: self.status() == 200, timeout_s)

    def status(self) -> int | None:
        """Return what /health says, None when nobody listens."""
        assert self.process.poll() is None, self.text
        try:
            return self.get("/health")[0]
        except OSError:
            return None

    def wait_for(self, condition, timeout_s: float = 30) -> None:
        wait_for(condition, lambda: self.text, timeout_s)

    def interrupt(self) -> None:
        """Do what a terminal does at Ctrl-C: signal the whole foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self, timeout_s: float = 20) -> int:
        return self.process.wait(timeout_s)

    def _call(self, method: str, path: str, body: object, headers: dict[str, str]) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json"} | headers)
            response = connection.getresponse()
            text = response.read()
            return response.status, json.loads(text) if text.startswith((b"{", b"[")) else text
        finally:
            connection.close()


@contextmanager
def serving(*arguments: str, port: int, folder: Path) -> Iterator[Server]:
    """Run a server over the instant executor for as long as the block."""
    server = Server("--executor", "instant", *arguments, port=port, folder=folder)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
