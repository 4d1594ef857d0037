"""The host process: loads, forks, reports ends, and goes when the front goes."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from penstock.core.block import KVGroup, KVLayout
from penstock.core.config import EngineConfig
from penstock.core.types import Role, WorkerId
from penstock.runtime.link import (
    Exited,
    Failed,
    Fork,
    Forked,
    Kill,
    Prepare,
    Progress,
    Ready,
    ToFront,
    WorkerSpec,
)
from penstock.runtime.process import HostProcess
from penstock.runtime.settings import ClusterSettings
from tests.runtime.odd_host import FACTS

MODULE = "tests.runtime.odd_host"
pytestmark = pytest.mark.usefixtures("no_leaks")


class Front:
    """What a front hears of its host."""

    def __init__(self, folder: Path, model: str, layout: KVLayout | None = None) -> None:
        self.heard: list[ToFront] = []
        self.lines: list[str] = []
        self.ends: list[str] = []
        self.host = HostProcess.spawn(folder, MODULE)
        self.host.watch(self.heard.append, self.ends.append, self.lines.append)
        settings = ClusterSettings(engine=EngineConfig(model=model))
        self.host.send(Prepare(settings, str(folder), "nowhere", layout))

    def fork(self, name: str, epoch: int = 1) -> None:
        worker_id = WorkerId(name)
        self.host.send(Fork(WorkerSpec(worker_id=worker_id, role=Role.MIXED, epoch=epoch, index=0)))

    async def hear(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.005)

    async def hear_of(self, kind: type[ToFront], count: int = 1) -> list[ToFront]:
        def found() -> list[ToFront]:
            return [message for message in self.heard if isinstance(message, kind)]

        await self.hear(lambda: len(found()) >= count)
        return found()


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="pt-", ignore_cleanup_errors=True) as path:
        yield Path(path)


def run(folder: Path, story, model: str = "model") -> None:
    async def tell() -> None:
        front = Front(folder, model)
        try:
            await story(front)
        finally:
            await front.host.end(5)

    asyncio.run(tell())


def test_it_loads_and_says_so(folder: Path):
    async def story(front: Front) -> None:
        await front.hear_of(Ready)
        assert front.heard == [Progress("thinking", 0.5), Ready(FACTS)]

    run(folder, story)


@pytest.mark.parametrize(
    ("model", "words"), [("missing", "there is no such model"), ("huge", "does not fit into")]
)
def test_a_model_that_cannot_be_loaded_is_explained(folder: Path, model: str, words: str):
    async def story(front: Front) -> None:
        (failed,) = await front.hear_of(Failed)
        assert words in failed.message
        await front.hear(lambda: front.ends)

    run(folder, story, model)


def test_a_model_that_is_not_the_clusters_is_refused_with_both_fingerprints(folder: Path):
    theirs = KVLayout("another model", (KVGroup((0,)),), 1, 2, 16, "float32")

    async def tell() -> None:
        front = Front(folder, "model", theirs)
        (failed,) = await front.hear_of(Failed)
        await front.hear(lambda: front.ends)
        await front.host.end(5)
        assert "not the one that the cluster serves" in failed.message
        assert theirs.fingerprint() in failed.message
        assert FACTS.layout.fingerprint() in failed.message

    asyncio.run(tell())


def test_a_host_that_crashes_leaves_its_last_lines(folder: Path):
    async def story(front: Front) -> None:
        await front.hear(lambda: front.ends)
        assert front.ends == ["exit code 1"]
        assert "ZeroDivisionError: a bug while loading" in front.host.last_lines

    run(folder, story, "broken")


@pytest.mark.parametrize(
    ("name", "reason", "last_line"),
    [
        ("quits", "exit code 0", None),
        ("raises", "exit code 1", "ValueError: a bug in the worker"),
        ("exits", "exit code 1", "SystemExit: 7"),
        ("dies", "killed by SIGSEGV", "last words"),
    ],
)
def test_the_end_of_a_worker_is_reported(
    folder: Path, name: str, reason: str, last_line: str | None
):
    async def story(front: Front) -> None:
        front.fork(name, epoch=3)
        (exited,) = await front.hear_of(Exited)
        assert (exited.worker_id, exited.epoch, exited.reason) == (name, 3, reason)
        if last_line is not None:
            assert any(line.startswith(last_line) for line in exited.last_lines)
            await front.hear(lambda: any(line.startswith(f"[{name}] ") for line in front.lines))

    run(folder, story)


def test_many_workers_live_and_die_apart(folder: Path):
    async def story(front: Front) -> None:
        for epoch in range(1, 6):
            front.fork("waits", epoch)
        front.fork("quits")
        forked = await front.hear_of(Forked, 6)
        assert len({worker.pid for worker in forked}) == 6
        await front.hear_of(Exited)
        front.host.send(Kill(WorkerId("waits"), 2))
        os.kill(forked[3].pid, signal.SIGKILL)
        gone = await front.hear_of(Exited, 3)
        assert {(e.worker_id, e.epoch) for e in gone[1:]} == {("waits", 2), ("waits", 4)}
        assert all(e.reason.startswith("killed by SIGKILL") for e in gone[1:])
        assert gone[1].last_lines == ("waiting",)

    run(folder, story)


def test_signals_of_the_terminal_are_for_the_front(folder: Path):
    async def story(front: Front) -> None:
        front.fork("waits")
        (worker,) = await front.hear_of(Forked)
        for pid in (worker.pid, front.host.pid):
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(pid, number)
        front.fork("quits")
        (gone,) = await front.hear_of(Exited)
        assert gone.worker_id == "quits"
        assert front.ends == []

    run(folder, story)


def test_a_host_that_dies_takes_its_workers_along(folder: Path):
    async def story(front: Front) -> None:
        front.fork("waits")
        (worker,) = await front.hear_of(Forked)
        os.kill(front.host.pid, signal.SIGKILL)
        await front.hear(lambda: front.ends)
        await front.hear(lambda: not psutil.pid_exists(worker.pid))

    run(folder, story)


FRONT = """
import asyncio, sys
from pathlib import Path
from tests.runtime.test_host import Front
from penstock.runtime.link import Forked
async def main():
    front = Front(Path(sys.argv[1]), sys.argv[2])
    for name in sys.argv[3:]:
        front.fork(name)
    await front.hear_of(Forked, len(sys.argv) - 3)
    print("up", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.mark.parametrize(("model", "workers"), [("model", ["waits", "watches"]), ("slow", [])])
def test_kill_minus_nine_of_the_front_leaves_nothing(tmp_path: Path, model: str, workers):
    with tempfile.TemporaryDirectory(prefix="pt-") as parent:
        folder = Path(parent) / "private"
        folder.mkdir()
        front = subprocess.Popen(
            [sys.executable, "-c", FRONT, str(folder), model, *workers], stdout=subprocess.PIPE
        )
        assert front.stdout is not None
        with front.stdout:
            assert front.stdout.readline() == b"up\n"
            children = psutil.Process(front.pid).children(recursive=True)
            assert len(children) == 1 + len(workers)
            if model == "slow":
                time.sleep(0.5)  # far enough for the host to be inside its loading
            front.kill()
            front.wait(10)
            _, alive = psutil.wait_procs(children, timeout=30)
        assert alive == []
        assert not folder.exists()
