"""Scheduling on a cluster of real processes with the built-in model: roles that change under load,
pins, overload over HTTP, and explanations of real requests.
"""

import asyncio
import random
import tempfile
from collections.abc import Awaitable, Callable
from itertools import compress
from pathlib import Path

import httpx
import pytest
from msgspec.structs import replace

from penstock.cli.cluster import BUILTIN_MODEL
from penstock.cli.explain_log import LogExplainer
from penstock.core.config import ControllerConfig, EngineConfig
from penstock.core.request import SamplingParams
from penstock.core.types import Role, WorkerId
from penstock.runtime.local import LocalCluster
from penstock.runtime.settings import ClusterSettings
from penstock.server.app import create_app
from penstock.server.settings import ServedModel, ServerSettings
from penstock.server.tokenizer import load_tokenizer
from tests.cluster.client import Stream, balanced

pytestmark = pytest.mark.slow

P0, D0, D1 = WorkerId("prefill-0"), WorkerId("decode-0"), WorkerId("decode-1")


def run(
    story: Callable[[LocalCluster], Awaitable[None]], control: ControllerConfig, **more
) -> None:
    async def tell() -> None:
        engine = EngineConfig(model=str(BUILTIN_MODEL), dtype="float32")
        settings = ClusterSettings(
            engine=engine, max_num_batched_tokens=128, control=control, **more
        )
        with tempfile.TemporaryDirectory(prefix="pt-") as parent:
            cluster = LocalCluster.launch(settings, parent=Path(parent))
            async with asyncio.timeout(110), cluster:
                await story(cluster)

    asyncio.run(tell())


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)


def prompts(count: int, length: int, seed: int = 3) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(10, 4096) for _ in range(length)] for _ in range(count)]


def roles(cluster: LocalCluster) -> dict[WorkerId, Role | None]:
    return {worker.info.worker_id: worker.role for worker in cluster.status().workers}


def test_roles_that_change_under_load_lose_nothing():
    asked = prompts(24, 150)

    async def story(cluster: LocalCluster) -> None:
        # Salted: what the flips are compared with must not be where they find their prefixes.
        quiet = [Stream(cluster, prompt, greedy(30), salt="quiet") for prompt in asked]
        expected = [await stream.tokens() for stream in quiet]
        streams, is_prefill = [], False
        for index, prompt in enumerate(asked):
            streams.append(Stream(cluster, prompt, greedy(30)))
            if index % 2:
                role = Role.DECODE if is_prefill else Role.PREFILL
                assert cluster.set_role(D1, role, is_pinned=True) is not role
                is_prefill = not is_prefill
            await asyncio.sleep(0.01)
        assert [await stream.tokens() for stream in streams] == expected
        assert {s.timeline.prefill_worker for s in streams} >= {P0, D1}
        assert {s.timeline.decode_worker for s in streams} >= {D0, D1}
        status = cluster.status()
        assert (status.failed, status.retried, status.flips) == (0, 0, 0)
        await balanced(cluster)
        # What it has cached it still has after twelve flips; nobody else is left to be asked.
        for worker in (P0, D0):
            cluster.retire_worker(worker)
        was_there = [D1 in (s.timeline.prefill_worker, s.timeline.decode_worker) for s in streams]
        for prompt, tokens in compress(zip(asked, expected, strict=True), was_there):
            again = Stream(cluster, prompt, greedy(30))
            assert await again.tokens() == tokens
            assert again.timeline.prefill_worker == D1
            assert again.timeline.cached_tokens >= 128

    run(story, ControllerConfig(policy="predicted"), decode=2)


QUICK = ControllerConfig(
    policy="predicted",
    is_switching_roles=True,
    role_interval_ms=20,
    role_cooldown_ms=5000,
    usual_ttft_ms=1000,
)
"""Hand-offs keep this TTFT on a machine with much else to do, and forty prompts do not."""


async def press(cluster: LocalCluster, seed: int, until: Callable[[], object]) -> None:
    """Send prompts with hardly any output until something is so, and they are answered."""
    streams = []
    for prompt in prompts(80, 400, seed):
        streams.append(Stream(cluster, prompt, greedy(1)))
        await asyncio.sleep(0.005)
        if until():
            break
    for stream in streams:
        assert len(await stream.tokens()) == 1


def test_roles_follow_the_load_and_pins_hold():
    async def story(cluster: LocalCluster) -> None:
        for worker in (D0, D1):
            cluster.set_role(worker, None, is_pinned=True)
        loads: list[float] = []
        await press(cluster, 1, lambda: loads.append(cluster.status().load_prefill))
        assert (cluster.status().flips, roles(cluster)[D1]) == (0, Role.DECODE)
        assert max(loads) > 1  # it would have liked to
        cluster.set_role(D1, None, is_pinned=False)
        await press(cluster, 2, lambda: cluster.status().flips)
        assert cluster.status().flips == 1
        assert roles(cluster) == {P0: Role.PREFILL, D0: Role.DECODE, D1: Role.PREFILL}
        assert cluster.status().failed == 0
        await balanced(cluster)

    run(story, QUICK, decode=2)


def http_client(cluster: LocalCluster) -> httpx.AsyncClient:
    """Return a client of the real application over a real cluster, without a socket between."""
    served = ServedModel(
        names=("tiny",),
        tokenizer=load_tokenizer(BUILTIN_MODEL),
        max_model_len=4096,
        vocab_size=4096,
    )
    app = create_app(cluster, served, ServerSettings(), cluster)
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app), base_url="http://test", timeout=60
    )


def body(prompt: list[int], num_tokens: int = 4) -> dict[str, object]:
    return {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}


def test_overload_is_refused_in_time_and_what_was_taken_is_served():
    asked = prompts(60, 1000)

    async def story(cluster: LocalCluster) -> None:
        async with http_client(cluster) as http:

            async def complete(prompt: list[int], **headers: str) -> httpx.Response:
                return await http.post("/v1/completions", json=body(prompt), headers=headers)

            for prompt in prompts(6, 1000, seed=9):  # it learns how long steps take here
                assert (await complete(prompt)).status_code == 200
            slo = {"x-slo-ttft-ms": "400"}
            answers = await asyncio.gather(*(complete(prompt, **slo) for prompt in asked))
            taken = [a for a in answers if a.status_code == 200]
            refused = [a for a in answers if a.status_code == 429]
            assert len(taken) + len(refused) == len(asked)
            assert taken
            assert refused
            assert all(a.json()["usage"]["completion_tokens"] == 4 for a in taken)
            error = refused[0].json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "capacity_exceeded")
            assert "the limit is 400" in error["message"]
            assert int(refused[0].headers["retry-after"]) >= 1
            # Who comes back when told to, with all of them served, is taken.
            await asyncio.sleep(int(refused[-1].headers["retry-after-ms"]) / 1e3)
            assert (await complete(asked[0], **slo)).status_code == 200
            # Without an SLO nobody is refused; it waits.
            patient = await asyncio.gather(*(complete(prompt) for prompt in asked[:20]))
            assert {a.status_code for a in patient} == {200}
        await balanced(cluster)
        assert cluster.status().failed == 0

    run(story, ControllerConfig(policy="predicted"))


def test_a_real_request_is_explained_while_it_is_known_and_from_the_log(tmp_path: Path):
    log = tmp_path / "run.log"
    live: list[dict] = []

    async def story(cluster: LocalCluster) -> None:
        async with http_client(cluster) as http:
            for prompt in prompts(4, 600):
                headers = {"x-request-id": "mine"}
                await http.post("/v1/completions", json=body(prompt, 20), headers=headers)
            live.extend((await http.get("/cluster/requests/mine/explanation")).json()["requests"])
            metrics = (await http.get("/metrics")).text
        assert 'penstock:ttft_prediction_count_total{model_name="tiny"} 4.0' in metrics
        assert 'penstock:regime{model_name="tiny",regime="normal"} 1.0' in metrics

    run(story, ControllerConfig(policy="predicted"), decision_log=str(log))
    (one,) = live
    assert (one["outcome"], one["num_tokens"]) == ("finished", 600)
    actual, predicted = one["actual"], one["predicted"]
    assert {one["prefill_worker"], one["decode_worker"]} <= {P0, D0}
    parts = [actual[name] for name in ("queue_ms", "prefill_ms", "transfer_ms", "first_decode_ms")]
    assert 0 < sum(parts) <= actual["ttft_ms"] + 0.01
    assert actual["tpot_ms"] > 0
    assert predicted["ttft_ms"] > 0
    explainer = LogExplainer(str(log), "mine")
    told = explainer.explain()
    assert len(told) == 4
    assert explainer.num_differing == 0
    assert (told[-1].request_id, told[-1].actual.ttft_ms) == (one["request_id"], actual["ttft_ms"])


def test_workers_come_with_the_load_and_go_when_it_is_over(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", logger="penstock.runtime.local")

    async def story(cluster: LocalCluster) -> None:
        await press(cluster, 4, lambda: cluster.status().limits.started)
        async with asyncio.timeout(20):
            while len(roles(cluster)) < 3:
                await asyncio.sleep(0.01)
        before = cluster.status()
        assert (before.limits.started, before.limits.most) == (1, 3)
        (added,) = set(roles(cluster)) - {P0, D0}
        assert roles(cluster)[added] is Role.PREFILL
        slots = cluster._supervisor.slots
        assert sorted(slots) == sorted(roles(cluster))
        async with http_client(cluster) as http:
            answer = (await http.get("/cluster")).json()
            assert (answer["workers_min"], answer["workers_max"]) == (2, 3)
            assert answer["workers_started"] == 1
            # It takes prompts like any other, and lets them be finished when it has to go.
            streams = [Stream(cluster, prompt, greedy(30)) for prompt in prompts(16, 400, 5)]
            for stream in streams:
                assert len(await stream.tokens()) == 30
            assert added in {stream.timeline.prefill_worker for stream in streams}
            async with asyncio.timeout(20):
                while len(slots) > 2:
                    await asyncio.sleep(0.01)
            assert (
                'workers_retired_total{model_name="tiny"} 1.0' in (await http.get("/metrics")).text
            )
        assert sorted(role.value for role in roles(cluster).values()) == ["decode", "prefill"]
        status = cluster.status()
        assert (status.failed, status.retried) == (0, 0)
        await balanced(cluster)

    control = replace(
        QUICK, workers_min=2, workers_max=3, resize_pause_ms=500, retire_after_ms=1000
    )
    run(story, control)
    assert "worker prefill-1 is started (3 of at most 3 here): prefill load" in caplog.text
    assert "is retired (2 of at most 3 here): prefill load" in caplog.text
