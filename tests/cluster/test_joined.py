"""The built-in model on two hosts that have joined a controller without a model.
Blocks and messages cross from host to host, authenticated, and the tokens are the same.
"""

import asyncio
import random
import tempfile
from pathlib import Path

import pytest

from penstock.cli.cluster import BUILTIN_MODEL
from penstock.core.config import EngineConfig
from penstock.core.errors import WorkersUnavailable
from penstock.core.request import SamplingParams
from penstock.core.types import Role
from penstock.runtime.local import LocalCluster
from penstock.runtime.settings import ClusterSettings, NetworkSettings
from tests.cli.joining import KEY, joining
from tests.cluster.client import Stream, balanced

pytestmark = pytest.mark.slow

LENGTHS = (2, 33, 64, 200)
PARAMS = SamplingParams(max_tokens=20, temperature=1.0, seed=1, ignore_eos=True)


def test_tokens_do_not_depend_on_the_hosts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PENSTOCK_CLUSTER_KEY", KEY)
    rng = random.Random(3)
    prompts = [[rng.randrange(10, 4096) for _ in range(length)] for length in LENGTHS]
    settings = ClusterSettings(
        engine=EngineConfig(model=str(BUILTIN_MODEL), dtype="float32"),
        prefill=0,
        decode=0,
        network=NetworkSettings(host="127.0.0.1"),
    )

    async def ask(cluster: LocalCluster, salt: str) -> list[Stream]:
        streams = [Stream(cluster, prompt, PARAMS, salt) for prompt in prompts]
        for stream in streams:
            await stream.tokens()
        await balanced(cluster)
        return streams

    async def workers(cluster: LocalCluster, count: int) -> None:
        async with asyncio.timeout(60):
            while len(cluster.status().workers) < count:
                await asyncio.sleep(0.02)

    async def tell(folder: Path) -> None:
        cluster = LocalCluster.launch(settings, parent=folder)
        async with asyncio.timeout(110), cluster:
            port = int(cluster.join_address.rpartition(":")[2])
            with pytest.raises(WorkersUnavailable, match="penstock worker --join"):
                cluster.start_workers(Role.DECODE, 1)
            options = {"port": port, "folder": folder}
            tcp = ("--transport", "tcp", "--kv-cache-memory", "64MiB", "--threads", "1")
            with joining("--role", "prefill", "--name", "a", *tcp, **options):
                await workers(cluster, 1)
                alone = await ask(cluster, "")
                assert {s.timeline.transport for s in alone} == {""}
                with joining("--role", "decode", "--name", "b", *tcp, **options):
                    await workers(cluster, 2)
                    apart = await ask(cluster, "another")
        for stream, other in zip(alone, apart, strict=True):
            assert stream.token_ids == other.token_ids
            timeline = other.timeline
            assert (timeline.prefill_worker, timeline.decode_worker) == (
                "prefill-a-0",
                "decode-b-0",
            )
            assert timeline.transport.split(" ")[0] == "tcp"
            assert timeline.pull_bytes > 0

    with tempfile.TemporaryDirectory(prefix="pt-") as folder:
        asyncio.run(tell(Path(folder)))
