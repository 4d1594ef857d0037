"""Tiers by way of codecs on a real cluster, as `penstock serve --kv-tier ...,codec=` makes it:
lossless blocks change no token, lossy ones few and never those of a request that must be exact.
"""

import asyncio
import random
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from penstock.cli.cluster import BUILTIN_MODEL
from penstock.core.config import EngineConfig
from penstock.core.request import SamplingParams
from penstock.core.types import MIB
from penstock.kv.quality import KvQuality
from penstock.runtime.local import LocalCluster
from penstock.runtime.settings import ClusterSettings, TierSettings
from tests.cluster.client import Stream, balanced

pytestmark = pytest.mark.slow
PARAMS = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
NUM_SESSIONS = 6
PROMPT_TOKENS = 420
POOL_BYTES = 5 * MIB
EXACT_SESSION = 0
EXACT = KvQuality()
TEXTS = [
    "def get(self, key, default=None):\n    return self._items.get(key, default)\n\n",
    "class Queue:\n    def __init__(self, items=()):\n        self._items = list(items)\n\n",
    "for index, line in enumerate(text.splitlines()):\n    print(index, line.strip())\n\n",
]


def prompts() -> list[list[int]]:
    """Code, as the built-in model knows it: what it says next is not chance."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(BUILTIN_MODEL / "tokenizer.json"))
    rng = random.Random(5)
    made = []
    for _ in range(NUM_SESSIONS):
        ids: list[int] = []
        while len(ids) < PROMPT_TOKENS:
            ids += tokenizer.encode(rng.choice(TEXTS)).ids
        made.append(ids[:PROMPT_TOKENS])
    return made


def serve(*tiers: TierSettings, quality: KvQuality = EXACT) -> tuple[list[list[int]], Counter[str]]:
    """Ask everything twice, more than the pool holds in between; return the second answers and what
    tiers did. With a lossy budget all but one session accept a loss.
    """
    engine = EngineConfig(
        model=str(BUILTIN_MODEL), dtype="float32", kv_cache_bytes=POOL_BYTES, max_model_len=512
    )
    settings = ClusterSettings(
        engine=engine,
        tiers=tiers,
        kv_quality=quality,
        max_num_seqs=2,
        prefill=0,
        decode=0,
        mixed=1,
    )

    async def story() -> tuple[list[list[int]], Counter[str]]:
        with tempfile.TemporaryDirectory(prefix="pc-") as parent:
            cluster = LocalCluster.launch(settings, parent=Path(parent))
            async with asyncio.timeout(110), cluster:
                answers, cached = [], Counter[str]()
                for turn in range(2):
                    for number, prompt in enumerate(prompts()):
                        is_lossy = not quality.is_exact and number != EXACT_SESSION
                        stream = Stream(cluster, prompt, PARAMS, accepts_loss=is_lossy)
                        tokens = await stream.tokens()
                        assert stream.timeline is not None
                        if turn:
                            answers.append(tokens)
                            cached[str(number)] = stream.timeline.cached_tokens
                await balanced(cluster)
                (worker,) = cluster.status().workers
                assert worker.load is not None
                for tier in worker.load.tiers:
                    cached["hits"] += tier.num_hits
                    cached["wrong"] += tier.num_corrupt + tier.num_failed
                    cached["encode_ns"] += tier.encode_ns
                    cached["decode_ns"] += tier.decode_ns
                    cached["saved"] += tier.raw_bytes_in - tier.bytes_in
                return answers, cached

    return asyncio.run(story())


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    answers, _ = serve()
    return answers


def test_lossless_tiers_change_no_token(expected: list[list[int]], tmp_path: Path):
    answers, found = serve(
        TierSettings(name="dram", num_bytes=3 * MIB, codec="lossless"),
        TierSettings(name="disk", num_bytes=32 * MIB, path=str(tmp_path), codec="lossless"),
    )
    assert answers == expected
    assert found["hits"] > 0
    assert found["encode_ns"] > 0 < found["decode_ns"]
    assert found["saved"] > 0
    assert found["wrong"] == 0


def test_int8_stays_within_its_budget_and_never_serves_exact_requests(
    expected: list[list[int]],
):
    answers, found = serve(
        TierSettings(name="dram", num_bytes=32 * MIB, codec="int8"), quality=KvQuality(0.005)
    )
    assert found["hits"] > 0
    assert found["wrong"] == 0
    assert answers[EXACT_SESSION] == expected[EXACT_SESSION]
    # Nobody kept it where it would have lost something, and the pool had lost it.
    assert found[str(EXACT_SESSION)] == 0
    assert any(found[str(n)] for n in range(1, NUM_SESSIONS))
    same = sum(
        a == b for x, y in zip(answers, expected, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert same >= 0.9 * sum(map(len, expected))
