"""A cluster of real processes over the instant executor: everything but the model."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from penstock.cli.cluster import BUILTIN_MODEL
from penstock.core.config import EngineConfig
from penstock.core.errors import PeerLost, PromptTooLong, StartupFailed, WorkersUnavailable
from penstock.core.request import SamplingParams
from penstock.core.types import FinishReason
from penstock.runtime.instant import InstantExecutor
from penstock.runtime.local import LocalCluster
from penstock.runtime.settings import ClusterSettings
from tests.cluster.client import Stream, balanced, generate

pytestmark = pytest.mark.usefixtures("no_leaks")

VOCABULARY = InstantExecutor(4096, avoided=(0, 5))
PROMPT = list(range(100, 180))


def instant(**options) -> ClusterSettings:
    engine = EngineConfig(model=str(BUILTIN_MODEL))
    return ClusterSettings(engine=engine, executor="instant", **options)


def run(
    story: Callable[[LocalCluster], Awaitable[None]], settings: ClusterSettings | None = None
) -> None:
    """Tell a story on a cluster; afterwards its folder and its processes are gone."""
    before = psutil.Process().children()  # such as Python's own resource tracker

    async def tell() -> None:
        with tempfile.TemporaryDirectory(prefix="pt-") as parent:
            cluster = LocalCluster.launch(settings or instant(), parent=Path(parent))
            async with asyncio.timeout(90), cluster:
                await story(cluster)
            assert list(Path(parent).iterdir()) == []
        left = [p for p in psutil.Process().children() if p not in before]
        assert not [p for p in left if p.status() != psutil.STATUS_ZOMBIE]

    asyncio.run(tell())


def params(max_tokens: int, seed: int = 1) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=seed)


def expected(prompt_tokens: int, num_tokens: int, seed: int = 1) -> list[int]:
    return [VOCABULARY.token_at(seed, prompt_tokens + i) for i in range(num_tokens)]


def pid_of(cluster: LocalCluster, worker_id: str) -> int | None:
    workers = cluster.status().workers
    return next((w.info.pid for w in workers if w.info.worker_id == worker_id), None)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "counts",
    [{}, {"prefill": 2, "decode": 2}, {"prefill": 0, "decode": 0, "mixed": 1}],
    ids=["1P1D", "2P2D", "mixed"],
)
def test_requests_are_served_and_every_block_comes_back(counts: dict[str, int]):
    async def story(cluster: LocalCluster) -> None:
        streams = [
            Stream(cluster, PROMPT[: 1 + n % 80], params(1 + n % 50, seed=n)) for n in range(200)
        ]
        for n, stream in enumerate(streams):
            assert await stream.tokens() == expected(1 + n % 80, 1 + n % 50, n)
            assert stream.finish_reason is FinishReason.LENGTH
            assert stream.timeline is not None
        await balanced(cluster)
        assert cluster.status().finished == 200

    run(story, instant(**counts))


def test_a_hand_off_is_in_the_ledger():
    async def story(cluster: LocalCluster) -> None:
        stream = Stream(cluster, PROMPT, params(2))
        await stream.tokens()
        timeline = stream.timeline
        assert timeline is not None
        assert (timeline.prefill_worker, timeline.decode_worker) == ("prefill-0", "decode-0")
        assert timeline.transport == "shm"
        assert timeline.pull_bytes == 3 * 32 * 16
        parts = timeline.ledger(time.monotonic_ns())
        total = parts.pop("ttft")
        assert sum(parts.values()) == pytest.approx(total)
        assert all(part >= 0 for part in parts.values())

    run(story)


def test_a_storm_of_cancels_leaves_nothing():
    async def story(cluster: LocalCluster) -> None:
        for wave in range(10):
            streams = [Stream(cluster, PROMPT, params(200, seed=n)) for n in range(60)]
            for n, stream in enumerate(streams):
                if n % 3 == 0:
                    stream.cancel()  # before the worker has heard of it
            await streams[1].until(wave)
            for stream in streams:
                stream.cancel()
            assert cluster.num_live_requests == 0
        await balanced(cluster)
        status = cluster.status()
        assert status.aborted + status.finished == 600
        assert await generate(cluster, PROMPT, params(5)) == expected(80, 5)
        await balanced(cluster)

    run(story)


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_requests_of_a_killed_worker_go_on_where_they_were(victim: str):
    async def story(cluster: LocalCluster) -> None:
        long = 1500
        streams = [Stream(cluster, PROMPT, params(long, seed=n)) for n in range(20)]
        await streams[0].until(10)
        first_pid = pid_of(cluster, victim)
        os.kill(first_pid, signal.SIGKILL)
        for n, stream in enumerate(streams):
            assert await stream.tokens() == expected(80, long, n)
        # Its end may be heard of after the last token.
        await until(
            lambda: len(cluster.status().workers) == 2 and pid_of(cluster, victim) != first_pid
        )
        assert cluster.status().finished == 20
        assert (cluster.status().retried > 0) == (victim == "decode-0")
        # The newcomer serves, and peers know it.
        assert await generate(cluster, PROMPT, params(5)) == expected(80, 5)
        await balanced(cluster)

    run(story)


def test_a_killed_host_is_replaced_with_all_its_workers():
    async def story(cluster: LocalCluster) -> None:
        stream = Stream(cluster, PROMPT, params(1500))
        await stream.until(10)
        psutil.Process(pid_of(cluster, "prefill-0")).parent().kill()
        assert await stream.tokens() == expected(80, 1500)
        await until(lambda: len(cluster.status().workers) == 2)
        await balanced(cluster)

    run(story)


def test_a_worker_that_keeps_dying_is_given_up_and_the_rest_serves(caplog):
    async def story(cluster: LocalCluster) -> None:
        for _ in range(4):
            await until(lambda: len(cluster.status().workers) == 3)
            pid = pid_of(cluster, "decode-1")
            os.kill(pid, signal.SIGKILL)
            # Its process has an end before the cluster knows of it.
            await until(lambda pid=pid: pid_of(cluster, "decode-1") != pid)
        await until(lambda: "is not started again" in caplog.text)
        assert await generate(cluster, PROMPT, params(5)) == expected(80, 5)

    run(story, instant(decode=2))
    assert "worker decode-1 is started again, epoch 4" in caplog.text


def test_nothing_is_taken_while_the_model_loads_or_the_cluster_drains():
    async def story() -> None:
        with tempfile.TemporaryDirectory(prefix="pt-") as parent:
            cluster = LocalCluster.launch(instant(), parent=Path(parent))
            await cluster.start()
            with pytest.raises(WorkersUnavailable, match="loading"):
                Stream(cluster, PROMPT, params(1))
            assert not cluster.status().is_ready
            await cluster.ready()
            assert cluster.status().is_ready
            stream = Stream(cluster, PROMPT, params(300))
            cluster.drain()
            assert not cluster.status().is_ready
            with pytest.raises(WorkersUnavailable, match="shutting down"):
                Stream(cluster, PROMPT, params(1))
            assert await stream.tokens() == expected(80, 300)
            await cluster.stop()

    asyncio.run(story())


def test_a_stop_fails_what_is_under_way():
    async def story() -> None:
        with tempfile.TemporaryDirectory(prefix="pt-") as parent:
            cluster = LocalCluster.launch(instant(), parent=Path(parent))
            async with cluster:
                stream = Stream(cluster, PROMPT, params(4000))
                await stream.until(1)
            with pytest.raises(PeerLost, match="stopped"):
                await stream.tokens()

    asyncio.run(story())


def test_a_prompt_that_cannot_fit_is_refused():
    async def story(cluster: LocalCluster) -> None:
        with pytest.raises(PromptTooLong, match="--kv-cache-memory"):
            Stream(cluster, list(range(200)), params(1))
        assert await generate(cluster, PROMPT, params(5)) == expected(80, 5)

    engine = EngineConfig(model=str(BUILTIN_MODEL), kv_cache_bytes=4 * 32 * 16)
    run(story, ClusterSettings(engine=engine, executor="instant"))


def test_a_missing_model_is_explained_and_nothing_stays():
    async def story() -> None:
        with tempfile.TemporaryDirectory(prefix="pt-") as parent:
            settings = ClusterSettings(engine=EngineConfig(model="/nowhere"), executor="instant")
            cluster = LocalCluster.launch(settings, parent=Path(parent))
            with pytest.raises(StartupFailed, match=r"config\.json"):
                async with cluster:
                    pass
            assert list(Path(parent).iterdir()) == []

    asyncio.run(story())


def test_every_decision_is_logged(tmp_path: Path):
    path = tmp_path / "decisions"

    async def story(cluster: LocalCluster) -> None:
        await generate(cluster, PROMPT, params(3))

    run(story, instant(decision_log=str(path)))
    names = sorted(entry.name for entry in tmp_path.iterdir())
    assert names == ["decisions", "decisions.decode-0.1", "decisions.prefill-0.1"]
    assert '"type":"Submit"' in path.read_text()
    assert '"type":"RunStep"' in (tmp_path / "decisions.decode-0.1").read_text()


def test_pinned_workers_share_the_cores_out():
    async def story(cluster: LocalCluster) -> None:
        cores = [
            set(psutil.Process(pid_of(cluster, name)).cpu_affinity())
            for name in ("prefill-0", "decode-0")
        ]
        assert all(len(each) == 1 for each in cores)
        assert cores[0] != cores[1] or len(os.sched_getaffinity(0)) == 1

    run(story, instant(is_pinned=True, threads=1))


def fails_to_start(settings: ClusterSettings, words: str, parent: Path) -> None:
    async def story() -> None:
        cluster = LocalCluster.launch(settings, parent=parent)
        with pytest.raises(StartupFailed, match=words):
            async with asyncio.timeout(30), cluster:
                pass
        assert list(parent.iterdir()) == []

    asyncio.run(story())


def test_a_worker_that_cannot_start_says_why_in_words(tmp_path: Path):
    engine = EngineConfig(model=str(BUILTIN_MODEL), kv_cache_bytes=1 << 62)
    settings = ClusterSettings(engine=engine, executor="instant")
    with tempfile.TemporaryDirectory(prefix="pt-") as parent:
        reason = r"worker (prefill|decode)-0 ended .*\nno shared memory of \d+ bytes"
        fails_to_start(settings, reason, Path(parent))


def test_a_folder_with_too_long_a_name_is_explained(tmp_path: Path):
    parent = tmp_path / ("x" * 100)
    parent.mkdir()
    fails_to_start(instant(), "TMPDIR", parent)


def test_a_decision_log_that_cannot_be_written_is_explained(tmp_path: Path):
    fails_to_start(instant(decision_log="/no/such/folder/log"), "--decision-log", tmp_path)


FRONT = """
import asyncio, sys
from pathlib import Path
from tests.runtime.test_local import *
async def main():
    cluster = LocalCluster.launch(instant(prefill=2, decode=2), parent=Path(sys.argv[1]))
    async with cluster:
        stream = Stream(cluster, PROMPT, params(4000))
        await stream.until(10)
        print("up", flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""


def test_kill_minus_nine_of_the_front_leaves_nothing():
    with tempfile.TemporaryDirectory(prefix="pt-") as parent:
        front = subprocess.Popen([sys.executable, "-c", FRONT, parent], stdout=subprocess.PIPE)
        assert front.stdout is not None
        with front.stdout:
            assert front.stdout.readline() == b"up\n"
            children = psutil.Process(front.pid).children(recursive=True)
            assert len(children) == 5
            assert len(list(Path(parent).glob("penstock-*/*.sock"))) == 5
            front.kill()
            front.wait(10)
            _, alive = psutil.wait_procs(children, timeout=30)
        assert alive == []
        assert list(Path(parent).iterdir()) == []


def test_a_sequence_ends_where_its_worker_s_cache_does():
    """One that outgrew it could neither go on nor make room, and would wait for ever."""

    async def story(cluster: LocalCluster) -> None:
        assert (await cluster.ready()).max_model_len == 4 * 32
        assert await generate(cluster, PROMPT, params(1000)) == expected(80, 128 - 80)
        await balanced(cluster)

    engine = EngineConfig(model=str(BUILTIN_MODEL), kv_cache_bytes=4 * 32 * 16)
    run(story, ClusterSettings(engine=engine, executor="instant"))
