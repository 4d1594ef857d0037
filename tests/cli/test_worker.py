"""`penstock worker` from outside: joining, leaving, dying, coming back, and being refused."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.cli.joining import KEY, PULSE, joining, workers_of
from tests.cli.server import Server, serving

pytestmark = pytest.mark.usefixtures("no_leaks")
LONG = 3000
LONG_PROMPT = "Once upon a time, there was a worker. " * 80


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PENSTOCK_CLUSTER_KEY", KEY)
    with tempfile.TemporaryDirectory(prefix="pt-", ignore_cleanup_errors=True) as path:
        yield Path(path)


@contextmanager
def listening(*arguments: str, port: int, folder: Path, listen: int = 0) -> Iterator[Server]:
    """Run a server that others can join; its `join_port` says where."""
    listen_at = ("--listen", f"127.0.0.1:{listen}")
    with serving(*listen_at, *PULSE, *arguments, port=port, folder=folder) as server:
        server.wait_for(lambda: "penstock worker --join" in server.text)
        server.join_port = int(re.search(r"--join 127\.0\.0\.1:(\d+)", server.text)[1])
        yield server


def text_of(server: Server, num_tokens: int = 20) -> str:
    status, answer = server.complete(num_tokens)
    assert status == 200, answer
    return answer["choices"][0]["text"]


def ledger_of(server: Server, prompt: str) -> dict[str, object]:
    body = {"prompt": prompt, "max_tokens": 4, "seed": 1}
    headers = {"x-penstock-ledger": "1", "x-request-id": "mine"}
    status, answer = server.post("/v1/completions", body, **headers)
    assert status == 200, answer
    return answer["penstock_ledger"]


class Streams:
    """Requests under way, each in a thread of its own."""

    def __init__(self, server: Server, count: int) -> None:
        self.answers: list[tuple[int, dict]] = []
        self._threads = [threading.Thread(target=self._ask, args=(server,)) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _ask(self, server: Server) -> None:
        try:
            self.answers.append(server.complete(LONG, ignore_eos=True))
        except (OSError, http.client.HTTPException) as error:
            self.answers.append((0, {"error": str(error)}))

    def join(self) -> None:
        for thread in self._threads:
            thread.join(30)

    def check(self) -> None:
        """Assert that all got the same, complete answer."""
        self.join()
        assert [status for status, _ in self.answers] == [200] * len(self._threads), self.answers
        assert len({answer["choices"][0]["text"] for _, answer in self.answers}) == 1
        assert all(a["usage"]["completion_tokens"] == LONG for _, a in self.answers)


def running(server: Server) -> bool:
    _, text = server.get("/metrics")
    return bool(re.search(r"num_requests_running\S* [1-9]", text.decode()))


def test_a_worker_joins_takes_traffic_drains_and_leaves(free_port: int, folder: Path):
    with listening("--prefill", "1", "--decode", "0", port=free_port, folder=folder) as server:
        alone = text_of(server)
        options = ("--role", "decode", "--name", "there")
        with joining(*options, port=server.join_port, folder=folder) as joined:
            joined.wait_until_in()
            assert workers_of(server) == {"prefill-0": "prefill", "decode-there-0": "decode"}
            _, answer = server.post(
                "/v1/completions",
                {"prompt": "Once upon a time", "max_tokens": 20, "seed": 1},
                **{"x-penstock-ledger": "1"},
            )
            assert answer["choices"][0]["text"] == alone
            ledger = answer["penstock_ledger"]
            assert ledger["decode_worker"] == "decode-there-0"
            assert ledger["transport"] == "shm"  # both are on this machine
            assert min(v for v in ledger.values() if isinstance(v, float)) >= 0
            streams = Streams(server, 4)
            server.wait_for(lambda: running(server))
            joined.interrupt()
            assert joined.end() == 0, joined.text
            streams.check()
            assert workers_of(server) == {"prefill-0": "prefill"}
        assert text_of(server) == alone


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ours", "theirs", "transport"),
    [
        ("--dtype float32 --block-size 64", "--block-size 16", "tcp"),
        ("--dtype bfloat16", "--dtype float32 --block-size 16", "shm"),
    ],
)
def test_workers_that_keep_their_kv_in_another_shape_hand_off_all_the_same(
    ours: str, theirs: str, transport: str, free_port: int, folder: Path
):
    # So short a prompt would otherwise be computed where it is decoded.
    rule = "--policy least_loaded"
    local = f"--executor model --prefill 1 --decode 0 --transport {transport} {rule} {ours}".split()
    options = f"--role decode --name there --transport {transport} {theirs}".split()
    with listening(*local, port=free_port, folder=folder) as server:
        alone = text_of(server)
        with joining(*options, port=server.join_port, folder=folder) as joined:
            joined.wait_until_in()
            ledgers: list[dict] = []

            def is_handed_off() -> bool:
                # On a machine that stalls the other host counts as silent now and then.
                body = {"prompt": "Once upon a time" * 9, "max_tokens": 20, "seed": 1}
                _, answer = server.post("/v1/completions", body, **{"x-penstock-ledger": "1"})
                ledgers.append(answer["penstock_ledger"])
                return bool(ledgers[-1]["transport"])

            server.wait_for(is_handed_off)
            ledger = ledgers[-1]
            assert (ledger["transport"], ledger["pull_verified"]) == (transport, True), ledger
            assert ledger["pull_bytes"] > 0
            if "bfloat16" not in ours:
                assert text_of(server) == alone
            found = re.search(r"handoff_recomputed\S* (\d+)", server.get("/metrics")[1].decode())
            assert found[1] == "0"


def test_a_killed_host_is_noticed_and_comes_back_with_another_epoch(free_port: int, folder: Path):
    options = ("--role", "decode", "--name", "there")
    with listening("--prefill", "1", "--decode", "0", port=free_port, folder=folder) as server:
        with joining(*options, port=server.join_port, folder=folder) as joined:
            joined.wait_until_in()
            streams = Streams(server, 4)
            server.wait_for(lambda: running(server))
            joined.process.kill()
            streams.check()
            server.wait_for(lambda: workers_of(server) == {"prefill-0": "prefill"})
            assert "decode-there-0 is silent" in server.text  # suspected first
            assert "decode-there-0 counts as dead: silent for" in server.text
        server.wait_for(lambda: "host there is gone" in server.text)
        with joining(*options, port=server.join_port, folder=folder) as joined:
            joined.wait_until_in()
            assert "decode-there-0" in workers_of(server)
            assert text_of(server)


def test_a_killed_worker_of_another_host_is_replaced_there(free_port: int, folder: Path):
    with listening("--prefill", "1", "--decode", "0", port=free_port, folder=folder) as server:
        options = ("--role", "decode", "--name", "there")
        with joining(*options, port=server.join_port, folder=folder) as joined:
            joined.wait_until_in()
            (host,) = psutil.Process(joined.process.pid).children()
            (worker,) = host.children()
            streams = Streams(server, 4)
            server.wait_for(lambda: running(server))
            worker.send_signal(signal.SIGKILL)
            streams.check()
            joined.wait_until_in(2)
            assert "counts as dead" not in server.text  # it was told, nothing had to be guessed


def test_a_worker_that_stands_still_is_ended_and_replaced_there(free_port: int, folder: Path):
    with listening("--prefill", "1", "--decode", "0", port=free_port, folder=folder) as server:
        options = ("--role", "decode", "--name", "there")
        with joining(*options, port=server.join_port, folder=folder) as joined:
            joined.wait_until_in()
            (host,) = psutil.Process(joined.process.pid).children()
            (worker,) = host.children()
            streams = Streams(server, 4)
            server.wait_for(lambda: running(server))
            worker.suspend()
            streams.check()
            joined.wait_until_in(2)
            assert not worker.is_running()


def test_the_controller_is_started_anew_and_workers_find_it(free_port: int, folder: Path):
    local = ("--prefill", "1", "--decode", "0")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = probe.getsockname()[1]
    with listening(*local, port=free_port, folder=folder, listen=listen) as server:
        before = text_of(server)
        options = ("--role", "decode", "--name", "there")
        with joining(*options, port=listen, folder=folder) as joined:
            joined.wait_until_in()
            (host,) = psutil.Process(joined.process.pid).children()
            (worker,) = host.children()
            first = ledger_of(server, LONG_PROMPT)
            assert (first["decode_worker"], first["cached_tokens"]) == ("decode-there-0", 0)
            streams = Streams(server, 2)
            server.wait_for(lambda: running(server))
            server.process.kill()
            server.process.wait()
            with pytest.raises(OSError, match=r"reset|refused|closed"):
                server.get("/health")
            with listening(*local, port=free_port, folder=folder, listen=listen) as again:
                again.wait_for(lambda: "decode-there-0" in workers_of(again))
                assert worker.is_running()  # the very process, with its blocks
                assert text_of(again) == before
                # It has told what it holds before it said anything else, and is asked for that.
                second = ledger_of(again, LONG_PROMPT)
                assert second["prefill_worker"] == second["decode_worker"] == "decode-there-0"
                assert second["cached_tokens"] >= 512
                _, why = again.get("/cluster/requests/mine/explanation")
                (candidate,) = {
                    (c["worker_id"], c["cached_tokens"])
                    for c in why["requests"][0]["candidates"]
                    if c["worker_id"] == "decode-there-0"
                }
                assert candidate[1] >= 512
                joined.interrupt()
                assert joined.end() == 0, joined.text
                assert workers_of(again) == {"prefill-0": "prefill"}
            streams.join()
            assert [status for status, _ in streams.answers] == [0, 0]  # cut off, and knows it


def test_a_server_without_workers_of_its_own_waits_for_one(free_port: int, folder: Path):
    none = ("--prefill", "0", "--decode", "0")
    with listening(*none, port=free_port, folder=folder) as server:
        assert server.status() == 503  # not ready, for a balancer, but it takes requests
        streams = Streams(server, 1)
        with joining(port=server.join_port, folder=folder) as joined:
            joined.wait_until_in()
            streams.check()


def refusal(*arguments: str, port: int, **environment: str) -> str:
    """Return what a worker says that cannot join."""
    done = subprocess.run(
        [sys.executable, "-m", "penstock", "worker", "--join", f"127.0.0.1:{port}", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done
    return done.stderr


def test_who_is_refused_is_told_why_and_the_server_goes_on(free_port: int, folder: Path):
    with listening("--mixed", "1", port=free_port, folder=folder) as server:
        before = text_of(server)
        wrong_key = refusal(port=server.join_port, PENSTOCK_CLUSTER_KEY="another key of 16")
        assert "does not accept our cluster key" in wrong_key
        for junk in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(10_000)):
            with socket.create_connection(("127.0.0.1", server.join_port)) as stranger:
                stranger.sendall(junk)
        assert "does not answer as a Penstock cluster" in refusal(port=free_port)
        assert text_of(server) == before
        assert workers_of(server) == {"mixed-0": "mixed"}


def test_an_address_where_nobody_listens(free_port: int, folder: Path):
    assert "nothing listens at" in refusal(port=free_port)
