"""The built-in model on real clusters: the tokens must be Hugging Face's, whoever computes them."""

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
from penstock.core.types import MIB, FinishReason
from penstock.runtime.local import LocalCluster
from penstock.runtime.settings import ClusterSettings
from tests.cluster.client import Stream, balanced

pytestmark = pytest.mark.slow

TOPOLOGIES = {
    "mixed": {"prefill": 0, "decode": 0, "mixed": 1},
    "1P1D": {},
    "2P2D": {"prefill": 2, "decode": 2},
    "1P1D push": {"handoff": Handoff.PUSH},
}
# One token, less than a block, a block and one more, several chunks.
LENGTHS = (1, 2, 5, 31, 32, 33, 64, 65, 100, 300)
NUM_TOKENS = 40
VOCAB_SIZE = 4096
POOL_BYTES = 64 * MIB


def prompts() -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(10, VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]


GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)


def seeded(index: int) -> SamplingParams:
    """Return sampling of another kind for each prompt."""
    kinds = [
        SamplingParams(temperature=1.0, seed=index),
        SamplingParams(temperature=0.7, top_p=0.9, seed=index),
        SamplingParams(temperature=1.3, top_k=20, min_p=0.02, seed=index),
        SamplingParams(temperature=0.9, repetition_penalty=1.2, presence_penalty=0.5, seed=index),
    ]
    fields = {name: getattr(kinds[index % 4], name) for name in SamplingParams.__struct_fields__}
    return SamplingParams(**fields | {"max_tokens": NUM_TOKENS, "logprobs": 0})


def settings(**options) -> ClusterSettings:
    # Small steps, so that long prompts go in chunks and share steps with those that decode.
    engine = EngineConfig(model=str(BUILTIN_MODEL), dtype="float32", kv_cache_bytes=POOL_BYTES)
    return ClusterSettings(engine=engine, max_num_batched_tokens=128, **options)


def run(story: Callable[[LocalCluster], Awaitable[None]], **options) -> None:
    async def tell() -> None:
        with tempfile.TemporaryDirectory(prefix="pt-") as parent:
            cluster = LocalCluster.launch(settings(**options), parent=Path(parent))
            async with asyncio.timeout(110), cluster:
                await story(cluster)

    asyncio.run(tell())


@pytest.fixture(scope="module")
def reference() -> list[list[int]]:
    """Return what Hugging Face generates greedily."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(BUILTIN_MODEL, dtype=torch.float32).eval()
    outputs = []
    for prompt in prompts():
        tokens = torch.tensor([prompt])
        with torch.inference_mode():
            whole = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=NUM_TOKENS,
                min_new_tokens=NUM_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        outputs.append(whole[0, len(prompt) :].tolist())
    return outputs


SAMPLED: dict[int, list[int]] = {}
"""What the first topology sampled for each prompt; the others must sample the same."""


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_tokens_do_not_depend_on_who_computes_them(topology: str, reference: list[list[int]]):
    async def story(cluster: LocalCluster) -> None:
        greedy = [Stream(cluster, prompt, GREEDY) for prompt in prompts()]
        sampled = [Stream(cluster, prompt, seeded(index)) for index, prompt in enumerate(prompts())]
        for stream, expected in zip(greedy, reference, strict=True):
            assert await stream.tokens() == expected, len(stream.request.prompt_token_ids)
        for index, stream in enumerate(sampled):
            tokens = await stream.tokens()
            assert tokens == SAMPLED.setdefault(index, tokens), index
            assert len(stream.logprobs) == len(tokens)
            assert all(value <= 0 for value in stream.logprobs)
        # Once more, now with the prefix cache full of these prompts.
        again = [Stream(cluster, prompt, GREEDY) for prompt in prompts()]
        for stream, expected in zip(again, reference, strict=True):
            assert await stream.tokens() == expected
        cached = [stream.timeline.cached_tokens for stream in again if stream.timeline]
        assert sum(cached) > 0
        await balanced(cluster)

    run(story, **TOPOLOGIES[topology])


def test_a_worker_killed_amid_its_work_changes_no_token(reference: list[list[int]]):
    async def story(cluster: LocalCluster) -> None:
        for victim in ("decode-0", "prefill-0"):
            streams = [Stream(cluster, prompt, GREEDY) for prompt in prompts() * 3]
            await streams[0].until(3)
            workers = {w.info.worker_id: w.info.pid for w in cluster.status().workers}
            os.kill(workers[victim], signal.SIGKILL)
            for stream, expected in zip(streams, reference * 3, strict=True):
                assert await stream.tokens() == expected
            async with asyncio.timeout(30):
                while len(cluster.status().workers) < 2:
                    await asyncio.sleep(0.01)
        assert cluster.status().retried > 0
        await balanced(cluster)

    run(story)


def test_small_pools_preempt_and_change_no_token(reference: list[list[int]]):
    async def story(cluster: LocalCluster) -> None:
        streams = [Stream(cluster, prompt, GREEDY) for prompt in prompts() * 4]
        for stream, expected in zip(streams, reference * 4, strict=True):
            assert await stream.tokens() == expected
        await balanced(cluster)
        loads = [worker.load for worker in cluster.status().workers]
        assert sum(load.preemptions for load in loads if load is not None) > 0

    engine = EngineConfig(
        model=str(BUILTIN_MODEL), dtype="float32", kv_cache_bytes=24 * 32 * 5120, block_size=32
    )

    async def tell() -> None:
        with tempfile.TemporaryDirectory(prefix="pt-") as parent:
            tight = ClusterSettings(engine=engine, max_num_batched_tokens=128)
            cluster = LocalCluster.launch(tight, parent=Path(parent))
            async with asyncio.timeout(110), cluster:
                await story(cluster)

    asyncio.run(tell())


def test_cancels_at_any_moment_leave_nothing(reference: list[list[int]]):
    async def story(cluster: LocalCluster) -> None:
        rng = random.Random(3)
        for _ in range(5):
            streams = [Stream(cluster, prompt, GREEDY) for prompt in prompts() * 2]
            rng.shuffle(streams)
            for stream in streams[:15]:
                await asyncio.sleep(rng.choice((0, 0, 0.001, 0.01)))
                stream.cancel()
            for stream in streams[15:]:
                await stream.tokens()
                assert stream.finish_reason is FinishReason.LENGTH
        for prompt, expected in zip(prompts(), reference, strict=True):
            assert await Stream(cluster, prompt, GREEDY).tokens() == expected
        await balanced(cluster)

    run(story)
