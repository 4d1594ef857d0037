"""A part of a prompt's KV is kept on real clusters: the same part whoever computes it, fewer bytes
cross, and nobody else sees anything of it."""

import asyncio
import os
import random
import signal
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from penstock.cli.cluster import BUILTIN_MODEL
from penstock.core.config import EngineConfig, Handoff
from penstock.core.request import SamplingParams
from penstock.core.types import MIB
from penstock.runtime.local import LocalCluster
from penstock.runtime.settings import ClusterSettings
from tests.cluster.client import Stream, balanced

pytestmark = pytest.mark.slow
TOPOLOGIES = {
    "mixed": {"prefill": 0, "decode": 0, "mixed": 1},
    "1P1D": {},
    "1P1D push": {"handoff": Handoff.PUSH},
}
KEPT = 128
BLOCK_SIZE = 32
TOKEN_BYTES = 5120
PARAMS = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
EXPECTED: dict[int, list[int]] = {}
"""What the first topology answered to each prompt; the others must answer the same."""


def prompts() -> list[list[int]]:
    """Shorter than what is to be kept, a little longer, and of several chunks."""
    rng = random.Random(7)
    return [[rng.randrange(10, 4096) for _ in range(length)] for length in (100, 170, 420, 700)]


def run(story: Callable[[LocalCluster], Awaitable[None]], **options) -> None:
    engine = EngineConfig(
        model=str(BUILTIN_MODEL), dtype="float32", block_size=BLOCK_SIZE, kv_cache_bytes=64 * MIB
    )
    settings = ClusterSettings(engine=engine, max_num_batched_tokens=128, **options)

    async def tell() -> None:
        with tempfile.TemporaryDirectory(prefix="ps-") as parent:
            cluster = LocalCluster.launch(settings, parent=Path(parent))
            async with asyncio.timeout(110), cluster:
                await story(cluster)
                await balanced(cluster)

    asyncio.run(tell())


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_same_part_is_kept_wherever_the_prompt_is_computed(topology: str) -> None:
    async def story(cluster: LocalCluster) -> None:
        whole = [Stream(cluster, prompt, PARAMS, "other") for prompt in prompts()]
        exact = [await stream.tokens() for stream in whole]
        # Twice: the second time prefixes are cached, and the end of the prompt is read again.
        for _ in range(2):
            streams = [Stream(cluster, prompt, PARAMS, kv_select=KEPT) for prompt in prompts()]
            for index, stream in enumerate(streams):
                tokens = await stream.tokens()
                assert tokens == EXPECTED.setdefault(index, tokens), index
                timeline = stream.timeline
                assert timeline is not None
                if len(prompts()[index]) <= KEPT:
                    assert (timeline.selected_tokens, tokens) == (0, exact[index])
                    continue
                assert KEPT - BLOCK_SIZE <= timeline.selected_tokens <= KEPT
                assert timeline.pull_bytes <= KEPT * TOKEN_BYTES
        assert EXPECTED[3] != exact[3]
        # What was computed with a part of the KV is nobody's prefix.
        again = [Stream(cluster, prompt, PARAMS) for prompt in prompts()]
        assert [await stream.tokens() for stream in again] == exact
        longer = [p + EXPECTED[i] + [11] for i, p in enumerate(prompts())]
        here = [await Stream(cluster, prompt, PARAMS).tokens() for prompt in longer]
        there = [await Stream(cluster, prompt, PARAMS, "other").tokens() for prompt in longer]
        assert here == there

    run(story, **TOPOLOGIES[topology])


def test_a_worker_killed_amid_its_work_changes_no_token() -> None:
    async def story(cluster: LocalCluster) -> None:
        first = [Stream(cluster, prompt, PARAMS, kv_select=KEPT) for prompt in prompts()]
        expected = [await stream.tokens() for stream in first]
        streams = [Stream(cluster, prompt, PARAMS, kv_select=KEPT) for prompt in prompts() * 2]
        await streams[3].until(3)
        workers = {w.info.worker_id: w.info.pid for w in cluster.status().workers}
        os.kill(workers["decode-0"], signal.SIGKILL)
        assert [await stream.tokens() for stream in streams] == expected * 2
        assert cluster.status().retried > 0

    run(story)
