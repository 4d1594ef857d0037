"""`penstock serve` from outside: starting, being asked, being told to stop, being killed."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from penstock.cli import main
from tests.cli.server import Server, serving

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def folder():
    """Return a private place for the run folder: short, because Unix sockets will be in it."""
    with tempfile.TemporaryDirectory(prefix="pt-", ignore_cleanup_errors=True) as path:
        yield Path(path)


def run_folders(folder: Path) -> list[Path]:
    return list(folder.glob("penstock-*"))


def test_it_serves_and_says_what_came_up(free_port: int, folder: Path):
    with serving("--prefill", "2", "--decode", "1", port=free_port, folder=folder) as server:
        server.wait_until_up()
        status, answer = server.complete(5)
        assert status == 200
        assert answer["usage"]["completion_tokens"] == 5
        _, models = server.get("/v1/models")
        assert [m["id"] for m in models["data"]] == ["instant-executor-no-model", "penstock-tiny"]
        server.interrupt()
        assert server.end() == 0
        text = server.text
    assert "NO MODEL RUNS" in text
    for words in (
        "worker prefill-0: prefill, pid ",
        "worker prefill-1: prefill, pid ",
        "worker decode-0: decode, pid ",
        "prefill-1 → decode-0 shm (memfd)",
        f"http://127.0.0.1:{free_port}",
        "curl ",
        "KV for ",
    ):
        assert words in text, text
    assert run_folders(folder) == []


def test_while_it_loads_it_listens_and_says_so(free_port: int, folder: Path):
    with serving(port=free_port, folder=folder) as server:
        server.wait_for(lambda: server.status() is not None)
        status, body = server.get("/v1/models")
        # It may have come up in between on a fast day; most of the time it has not.
        if status == 503:
            assert "the model is loading" in body["error"]["message"]
        server.wait_until_up()


def test_requests_are_logged_when_asked_for(free_port: int, folder: Path):
    # So short a prompt would otherwise be computed where it is decoded.
    flags = ["--log-requests", "--policy", "least_loaded"]
    with serving(*flags, port=free_port, folder=folder) as server:
        server.wait_until_up()
        server.complete(3)
        server.wait_for(lambda: "output=3" in server.text)
        assert "workers=prefill-0->decode-0 transport=shm" in server.text


def test_the_transport_that_was_asked_for_is_used_and_proven(
    free_port: int, folder: Path, monkeypatch
):
    monkeypatch.setenv("PENSTOCK_CLUSTER_KEY", "a key for this test alone")
    flags = ["--transport", "tcp", "--policy", "least_loaded"]
    with serving(*flags, port=free_port, folder=folder) as server:
        server.wait_until_up()
        headers = {"x-penstock-ledger": "1"}
        body = {"prompt": "Once upon a time", "max_tokens": 2}
        ledger = server.post("/v1/completions", body, **headers)[1]["penstock_ledger"]
        assert ledger["transport"].split(" ")[0] == "tcp"
        assert ledger["pull_spans"] == 1
        metrics = server.get("/metrics")[1].decode()
        (moved,) = re.findall(r'handoff_bytes_total{.*transport="tcp.*"} (\S+)', metrics)
        assert float(moved) == ledger["pull_bytes"] > 0
        assert re.search(r'handoff_seconds_count{.*transport="tcp.*"} 1.0', metrics)
        assert "prefill-0 → decode-0 tcp" in server.text


def test_the_doctor_looks_at_every_pair_of_workers(
    free_port: int, folder: Path, capsys, monkeypatch
):
    monkeypatch.setenv("PENSTOCK_CLUSTER_KEY", "a key for this test alone")
    with serving("--transport", "tcp", port=free_port, folder=folder) as server:
        server.wait_until_up()
        url = f"http://127.0.0.1:{free_port}"
        assert main(["doctor", "--quick", "--cluster", url]) == 0
        page = capsys.readouterr().out
        for pair in ("decode-0 ← prefill-0", "prefill-0 ← decode-0"):
            (line,) = [line for line in page.splitlines() if pair in line]
            assert re.search(r"shm.* GB/s, .* of a copy in one process.*\(not used\)", line)
            assert re.search(r"; tcp.* GB/s, .* of a plain socket, opened in [0-9.]+ ms; ", line)
            assert re.search(r"clocks [+-]\d+ µs apart, known to .*; KV \w{16} on both", line)
        # It has left everybody able to serve.
        assert server.complete(3)[0] == 200


def test_one_mixed_worker_is_enough(free_port: int, folder: Path):
    with serving("--mixed", "1", port=free_port, folder=folder) as server:
        server.wait_until_up()
        assert server.complete(3)[0] == 200
        assert "worker mixed-0" in server.text
        assert "worker prefill-0" not in server.text


def test_an_api_key_is_asked_for(free_port: int, folder: Path, monkeypatch):
    monkeypatch.setenv("PENSTOCK_API_KEY", "secret")
    with serving(port=free_port, folder=folder) as server:
        server.wait_until_up()
        assert server.complete(1)[0] == 401
        body = {"prompt": "x", "max_tokens": 1}
        assert server.post("/v1/completions", body, Authorization="Bearer secret")[0] == 200


def test_a_unix_socket_serves_too(free_port: int, folder: Path):
    path = folder / "api.sock"
    with serving("--uds", str(path), port=free_port, folder=folder) as server:
        server.wait_for(lambda: "ready after" in server.text)
        assert path.stat().st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert connection.makefile("rb").readline() == b"HTTP/1.1 200 OK\r\n"
        server.interrupt()
        assert server.end() == 0
        assert not path.exists()


class LongAnswer(threading.Thread):
    """A streamed request that takes a while. `outcome` is its finish reason, or the error."""

    def __init__(self, server: Server, num_tokens: int) -> None:
        super().__init__()
        self.is_under_way = threading.Event()
        self.outcome: str | Exception | None = None
        self._server, self._num_tokens = server, num_tokens

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=60)
        body = {"prompt": "Once", "max_tokens": self._num_tokens, "stream": True, "seed": 1}
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            for line in connection.getresponse():
                self.is_under_way.set()
                if line.startswith(b"data: {"):
                    event = json.loads(line.removeprefix(b"data: "))
                    if "error" in event:
                        self.outcome = RuntimeError(event["error"]["message"])
                    elif reason := event["choices"][0]["finish_reason"]:
                        self.outcome = reason
        except (OSError, http.client.HTTPException) as error:
            self.outcome = error
        finally:
            connection.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_requests_finish(free_port: int, folder: Path, number: signal.Signals):
    with serving(port=free_port, folder=folder) as server:
        server.wait_until_up()
        answer = LongAnswer(server, 4000)
        answer.start()
        assert answer.is_under_way.wait(20)
        # Everybody gets it, as from a terminal or a service manager.
        for process in [*psutil.Process(server.process.pid).children(recursive=True)]:
            process.send_signal(number)
        server.process.send_signal(number)
        assert server.end() == 0
        answer.join(20)
        text = server.text
    assert answer.outcome == "length", text
    assert "finishing 1 requests" in text
    assert run_folders(folder) == []


def test_a_second_interrupt_ends_at_once(free_port: int, folder: Path):
    with serving("--shutdown-timeout", "60", port=free_port, folder=folder) as server:
        server.wait_until_up()
        answers = [LongAnswer(server, 4000) for _ in range(30)]
        for answer in answers:
            answer.start()
        assert all(answer.is_under_way.wait(20) for answer in answers)
        server.interrupt()
        time.sleep(0.2)
        server.interrupt()
        started = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - started < 30
        for answer in answers:
            answer.join(20)
        assert any(answer.outcome != "length" for answer in answers)
    assert run_folders(folder) == []


def test_draining_ends_after_the_time_allowed(free_port: int, folder: Path):
    with serving("--shutdown-timeout", "1", port=free_port, folder=folder) as server:
        server.wait_until_up()
        answers = [LongAnswer(server, 4000) for _ in range(30)]
        for answer in answers:
            answer.start()
        assert all(answer.is_under_way.wait(20) for answer in answers)
        server.interrupt()
        started = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - started < 8
        for answer in answers:
            answer.join(20)
    assert run_folders(folder) == []


def test_an_interrupt_while_loading_ends_at_once(free_port: int, folder: Path):
    with serving(port=free_port, folder=folder) as server:
        server.wait_for(lambda: server.status() == 503)
        server.interrupt()
        assert server.end() == 0
    assert run_folders(folder) == []


def test_kill_minus_nine_leaves_nothing(free_port: int, folder: Path):
    with serving("--decode", "2", port=free_port, folder=folder) as server:
        server.wait_until_up()
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert len(children) == 4
        server.process.kill()
        server.end()
        _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []
    assert run_folders(folder) == []  # and no shared memory: `no_leaks`


def test_a_taken_port_is_one_clear_line(free_port: int, folder: Path, capsys):
    with socket.create_server(("127.0.0.1", free_port)):
        assert main(["serve", "--executor", "instant", "--port", str(free_port)]) == 1
    error = capsys.readouterr().err
    assert error == (
        f"penstock: port {free_port} is taken: choose another with --port, "
        "or --port 0 for a free one\n"
    )


def test_a_missing_model_is_one_clear_line(free_port: int, folder: Path):
    server = Server("/no/such/model", "--executor", "instant", port=free_port, folder=folder)
    assert server.end() == 1
    assert server.text.splitlines()[-1].startswith("penstock: ")
    assert "Traceback" not in server.text
    assert run_folders(folder) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--prefill", "0", "--decode", "1"], "--prefill 1 --decode 1, or --mixed 1"),
        (["serve", "--port", "http"], "'http' is not a port"),
        (["serve", "--kv-cache-memory", "lots"], "'lots' is not a size such as 1GiB"),
        (["bake"], "invalid choice: 'bake'"),
        ([], "COMMAND"),
    ],
)
def test_misuse_is_explained_and_ends_with_2(arguments: list[str], words: str):
    done = subprocess.run(
        [sys.executable, "-m", "penstock", *arguments], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
