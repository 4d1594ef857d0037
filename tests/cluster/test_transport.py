"""The built-in model over each transport: the same tokens, and it was that transport."""

import asyncio
import json
import random
import tempfile
from pathlib import Path

import pytest

from penstock.cli.cluster import BUILTIN_MODEL
from penstock.core.config import EngineConfig
from penstock.core.request import SamplingParams
from penstock.core.types import MIB
from penstock.runtime.local import LocalCluster
from penstock.runtime.settings import ClusterSettings
from penstock.transport.key import VARIABLE
from tests.cluster.client import Stream, balanced

pytestmark = pytest.mark.slow

LENGTHS = (2, 33, 64, 200)
TOKENS: dict[int, list[int]] = {}
"""What the first transport gave for each prompt; the other must give the same."""


@pytest.mark.parametrize("transport", ["shm", "tcp", "nixl"])
def test_tokens_do_not_depend_on_the_transport(transport: str, monkeypatch: pytest.MonkeyPatch):
    if transport == "nixl":
        pytest.importorskip("nixl")
    monkeypatch.setenv(VARIABLE, "a key for this test alone")

    async def tell(folder: Path) -> None:
        log = folder / "log"
        settings = ClusterSettings(
            engine=EngineConfig(model=str(BUILTIN_MODEL), dtype="float32", kv_cache_bytes=64 * MIB),
            transport=transport,
            decision_log=str(log),
        )
        rng = random.Random(3)
        prompts = [[rng.randrange(10, 4096) for _ in range(length)] for length in LENGTHS]
        cluster = LocalCluster.launch(settings, parent=folder)
        async with asyncio.timeout(110), cluster:
            params = SamplingParams(max_tokens=20, temperature=1.0, seed=1, ignore_eos=True)
            streams = [Stream(cluster, prompt, params) for prompt in prompts]
            for index, stream in enumerate(streams):
                tokens = await stream.tokens()
                assert tokens == TOKENS.setdefault(index, tokens)
            await balanced(cluster)
        moves = moves_of(log.with_name("log.decode-0.1"))
        assert len(moves) == len(LENGTHS)
        assert all(move["error"] is None for move in moves)
        assert {move["transport"].split(" ")[0] for move in moves} == {transport}

    with tempfile.TemporaryDirectory(prefix="pt-") as folder:
        asyncio.run(tell(Path(folder)))


def moves_of(log: Path) -> list[dict[str, object]]:
    """Return the moves that a worker's decision log says have ended."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    events = [part for entry in entries for part in _parts(entry)]
    return [event for event in events if event.get("type") == "MoveDone"]


def _parts(entry: dict[str, object] | list[object]) -> list[dict[str, object]]:
    values = entry.values() if isinstance(entry, dict) else entry
    return [value for value in values if isinstance(value, dict)]
