"""The built-in model with tiers on a real cluster: conversations that outgrow the pool get the same
tokens as without, and find their past in DRAM and on disk, also after a restart.
"""

import asyncio
import os
import random
import signal
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from penstock.cli.cluster import BUILTIN_MODEL
from penstock.core.config import EngineConfig
from penstock.core.request import SamplingParams
from penstock.core.types import MIB
from penstock.runtime.local import LocalCluster
from penstock.runtime.settings import ClusterSettings, TierSettings
from tests.cluster.client import Stream, balanced, generate

pytestmark = pytest.mark.slow
NUM_NEW = 40
PARAMS = SamplingParams(max_tokens=NUM_NEW, temperature=0.0, ignore_eos=True)
NUM_SESSIONS = 4
NUM_TURNS = 3
NEW_TOKENS = 160
POOL_BYTES = 8 * MIB


def settings(*tiers: TierSettings, **workers: int) -> ClusterSettings:
    engine = EngineConfig(
        model=str(BUILTIN_MODEL), dtype="float32", kv_cache_bytes=POOL_BYTES, max_model_len=1024
    )
    return ClusterSettings(engine=engine, tiers=tiers, max_num_seqs=2, **workers)


def serve(
    settings: ClusterSettings, turns: range, before: Sequence[list[int]] = ()
) -> tuple[list[list[int]], Counter[str]]:
    """Return the tokens of some turns of all sessions, and hits and failures by tier. `before` are
    the answers to earlier turns.
    """

    async def tell() -> tuple[list[list[int]], Counter[str]]:
        with tempfile.TemporaryDirectory(prefix="pt-") as parent:
            cluster = LocalCluster.launch(settings, parent=Path(parent))
            async with asyncio.timeout(110), cluster:
                answers, found = list(before), Counter[str]()
                for turn in turns:
                    for session in range(NUM_SESSIONS):
                        tokens = prompt(session, turn, answers)
                        stream = Stream(cluster, tokens, PARAMS)
                        answers.append(await stream.tokens())
                        known = len(tokens) - NEW_TOKENS - NUM_NEW
                        assert stream.timeline is not None
                        found["answers"] += turn > 0 and stream.timeline.cached_tokens > known
                await balanced(cluster)
                return answers[len(before) :], found + counted(cluster)

    return asyncio.run(tell())


def prompt(session: int, turn: int, answers: Sequence[list[int]]) -> list[int]:
    """All that was said and answered up to a turn."""
    rng = random.Random(session)
    tokens = [rng.randrange(10, 4096) for _ in range(300)]
    for before in range(turn):
        tokens += answers[NUM_SESSIONS * before + session]
        tokens += [rng.randrange(10, 4096) for _ in range(NEW_TOKENS)]
    return tokens


def counted(cluster: LocalCluster) -> Counter[str]:
    found: Counter[str] = Counter()
    for worker in cluster.status().workers:
        for tier in worker.load.tiers if worker.load else ():
            found[f"{tier.name} hits"] += tier.num_hits
            found["shared"] += tier.num_shared
            found["wrong"] += tier.num_corrupt + tier.num_failed
    return found


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    answers, found = serve(settings(), range(NUM_TURNS))
    assert set(found) <= {"answers"}
    return answers


@pytest.mark.parametrize("workers", [{}, {"prefill": 0, "decode": 0, "mixed": 1}])
def test_conversations_find_their_past_in_dram_and_on_disk(
    workers: dict[str, int], expected: list[list[int]], tmp_path: Path
):
    tiers = (
        TierSettings(name="dram", num_bytes=POOL_BYTES),
        TierSettings(name="disk", num_bytes=64 * MIB, path=str(tmp_path)),
    )
    answers, found = serve(settings(*tiers, **workers), range(NUM_TURNS))
    assert answers == expected
    assert found["disk hits"] > 0
    assert found["dram hits"] > 0
    assert found["wrong"] == 0
    # The worker that computes prompts has the answers from the one that gave them.
    if not workers:
        assert found["shared"] > 0
        assert found["answers"] > NUM_SESSIONS


def test_what_is_on_disk_survives_the_cluster_and_a_flipped_bit_is_computed_again(
    expected: list[list[int]], tmp_path: Path
):
    disk = TierSettings(name="disk", num_bytes=64 * MIB, path=str(tmp_path))
    first, _ = serve(settings(disk), range(1))
    # One bit in one place of every half MiB: some blocks are wrong, most are right.
    for path in tmp_path.iterdir():
        with path.open("r+b") as file:
            for at in range(MIB, os.path.getsize(path), MIB // 2):
                file.seek(at)
                byte = file.read(1)
                file.seek(at)
                file.write(bytes([byte[0] ^ 1]))
    second, found = serve(settings(disk), range(1, 2), first)
    assert first + second == expected[: 2 * NUM_SESSIONS]
    assert found["disk hits"] > 0
    assert found["wrong"] > 0


def test_the_successor_of_a_killed_worker_finds_what_it_had_on_disk(
    expected: list[list[int]], tmp_path: Path
):
    disk = TierSettings(name="disk", num_bytes=64 * MIB, path=str(tmp_path))

    async def story() -> Counter[str]:
        with tempfile.TemporaryDirectory(prefix="pt-") as parent:
            wanted = settings(disk, prefill=0, decode=0, mixed=1)
            cluster = LocalCluster.launch(wanted, parent=Path(parent))
            async with asyncio.timeout(110), cluster:
                for session in range(NUM_SESSIONS):
                    tokens = await generate(cluster, prompt(session, 0, expected), PARAMS)
                    assert tokens == expected[session]
                await balanced(cluster)
                os.kill(cluster.status().workers[0].info.pid, signal.SIGKILL)
                for session in range(NUM_SESSIONS):
                    tokens = await generate(cluster, prompt(session, 1, expected), PARAMS)
                    assert tokens == expected[NUM_SESSIONS + session]
                await balanced(cluster)
                return counted(cluster)

    found = asyncio.run(story())
    assert found["disk hits"] > 0
    assert found["wrong"] == 0
