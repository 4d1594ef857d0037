"""A cluster of real processes that is changed while it serves: workers started, retired, given
another role, and one that stands still.
"""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from penstock.cli.cluster import BUILTIN_MODEL
from penstock.core.config import EngineConfig
from penstock.core.errors import BadRequest, UnknownWorker
from penstock.core.request import SamplingParams
from penstock.core.types import MIB, Role, WorkerId
from penstock.runtime.folder import RunFolder
from penstock.runtime.local import LocalCluster
from penstock.runtime.process import HOST_MODULE, HostProcess
from penstock.runtime.settings import INSTANT_EXECUTOR, ClusterSettings, PulseSettings
from tests.cluster import stuck_host
from tests.cluster.client import Stream, balanced, generate

PROMPT = list(range(10, 90))
LONG = 1500
D0, D1, P0 = WorkerId("decode-0"), WorkerId("decode-1"), WorkerId("prefill-0")


def run(
    story: Callable[[LocalCluster], Awaitable[None]],
    host_module: str = HOST_MODULE,
    **settings,
) -> None:
    async def tell() -> None:
        engine = EngineConfig(model=str(BUILTIN_MODEL), kv_cache_bytes=16 * MIB)
        with tempfile.TemporaryDirectory(prefix="pt-") as parent:
            folder = RunFolder.create(Path(parent))
            cluster = LocalCluster(
                ClusterSettings(engine=engine, executor=INSTANT_EXECUTOR, **settings),
                folder,
                HostProcess.spawn(folder.path, host_module),
            )
            async with asyncio.timeout(60), cluster:
                await story(cluster)

    asyncio.run(tell())


def params(num_tokens: int, seed: int = 0) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, seed=seed, ignore_eos=True)


async def until(condition: Callable[[], object], timeout_s: float = 20) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def names(cluster: LocalCluster) -> list[str]:
    return sorted(worker.info.worker_id for worker in cluster.status().workers)


def test_workers_are_started_and_retired_while_requests_run():
    async def story(cluster: LocalCluster) -> None:
        assert cluster.start_workers(Role.DECODE, 1) == (D1,)
        await until(lambda: names(cluster) == [D0, D1, P0])
        streams = [Stream(cluster, PROMPT, params(LONG, seed=n)) for n in range(8)]
        await streams[0].until(10)
        cluster.retire_worker(D0)
        before = [await stream.tokens() for stream in streams]
        assert len({len(tokens) for tokens in before}) == 1
        await until(lambda: names(cluster) == [D1, P0])
        assert cluster.status().retried == 0  # it finished what it had
        again = await generate(cluster, PROMPT, params(LONG))
        assert again == before[0]
        await balanced(cluster)
        # Its name is free again, and what comes back under it is another incarnation.
        assert cluster.start_workers(Role.DECODE, 1) == (D0,)
        await until(lambda: names(cluster) == [D0, D1, P0])
        (came_back,) = (w for w in cluster.status().workers if w.info.worker_id == D0)
        assert came_back.info.epoch == 2

    run(story)


def test_a_retired_worker_that_dies_is_not_replaced():
    async def story(cluster: LocalCluster) -> None:
        cluster.start_workers(Role.DECODE, 1)
        await until(lambda: D1 in names(cluster))
        streams = [Stream(cluster, PROMPT, params(LONG, seed=n)) for n in range(8)]
        await streams[0].until(10)
        pid = next(w.info.pid for w in cluster.status().workers if w.info.worker_id == D0)
        cluster.retire_worker(D0)
        psutil.Process(pid).kill()
        for stream in streams:
            assert len(await stream.tokens()) == LONG
        await until(lambda: names(cluster) == [D1, P0])
        assert list(cluster._supervisor.slots) == [P0, D1]

    run(story)


def test_roles_are_switched_while_requests_run():
    async def story(cluster: LocalCluster) -> None:
        stream = Stream(cluster, PROMPT, params(LONG))
        await stream.until(10)
        assert cluster.set_role(D0, Role.PREFILL, is_pinned=True) is Role.DECODE
        assert cluster.set_role(P0, Role.DECODE, is_pinned=True) is Role.PREFILL
        other = Stream(cluster, PROMPT, params(5), salt="another")
        tokens = await other.tokens()
        assert (other.timeline.prefill_worker, other.timeline.decode_worker) == (D0, P0)
        assert (await stream.tokens())[:5] == tokens
        await balanced(cluster)

    run(story)


def test_what_cannot_be_is_refused():
    async def story(cluster: LocalCluster) -> None:
        with pytest.raises(UnknownWorker, match="up are: decode-0, prefill-0"):
            cluster.retire_worker(WorkerId("nobody"))
        with pytest.raises(UnknownWorker):
            cluster.set_role(WorkerId("nobody"), Role.DECODE, is_pinned=True)
        for count in (0, -1, 1000):
            with pytest.raises(BadRequest, match="more workers can be started"):
                cluster.start_workers(Role.DECODE, count)

    run(story)


PULSE = PulseSettings(interval_s=0.1, suspect_after_s=0.5, lost_after_s=2.0, step_timeout_s=2.0)


@pytest.mark.parametrize("victim", [P0, D0])
def test_a_worker_that_stands_still_is_noticed_ended_and_replaced(victim: WorkerId, caplog):
    async def story(cluster: LocalCluster) -> None:
        streams = [Stream(cluster, PROMPT, params(LONG, seed=n)) for n in range(4)]
        await streams[0].until(10)
        first = next(w.info for w in cluster.status().workers if w.info.worker_id == victim)
        process = psutil.Process(first.pid)
        process.suspend()
        for stream in streams:
            assert len(await stream.tokens()) == LONG
        await until(
            lambda: any(
                w.info.worker_id == victim and w.info.epoch > 1 for w in cluster.status().workers
            )
        )
        assert not process.is_running()
        assert len(await generate(cluster, PROMPT, params(5))) == 5
        await balanced(cluster)

    run(story, pulse=PULSE)
    assert f"worker {victim} is silent" in caplog.text  # suspected first
    assert f"worker {victim} counts as dead: silent for" in caplog.text


def test_a_worker_that_is_stuck_in_a_step_is_ended_and_replaced(
    tmp_path: Path, monkeypatch, caplog
):
    file = tmp_path / "stuck"
    monkeypatch.setenv(stuck_host.VARIABLE, str(file))

    async def story(cluster: LocalCluster) -> None:
        streams = [Stream(cluster, PROMPT, params(LONG, seed=n)) for n in range(4)]
        await streams[0].until(10)
        file.touch()
        for stream in streams:
            assert len(await stream.tokens()) == LONG
        await until(lambda: sum(w.info.epoch for w in cluster.status().workers) >= 3)
        assert not file.exists()
        assert len(await generate(cluster, PROMPT, params(5))) == 5
        await balanced(cluster)

    run(story, pulse=PULSE, host_module=stuck_host.__name__)
    assert "counts as dead: stuck in a step for" in caplog.text
    assert "silent" not in caplog.text  # its loop was alive all the time
