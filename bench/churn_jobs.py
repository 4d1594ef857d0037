"""The requests of a churn: a Mooncake trace, or a seeded synthetic one of the same kind, as jobs.

`churn.py` beside it takes them through two pools.
"""

import gzip
import json
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.core.types import BlockHash, RequestId

TRACE_BLOCK = 512
"""Tokens that one `hash_id` of a Mooncake trace stands for."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request: names of its full prompt blocks, and of the blocks that its answer will fill."""

    request_id: RequestId
    num_prompt: int
    num_output: int
    hashes: tuple[BlockHash, ...]


Row = tuple[int, int, list[int]]


def mooncake(path: str) -> list[Row]:
    """Return (input tokens, output tokens, hash ids) of each request of a trace file."""
    opener = gzip.open if path.endswith(".gz") else open
    with opener(Path(path), "rt", encoding="utf-8") as lines:
        rows = map(json.loads, lines)
        return [(row["input_length"], row["output_length"], row["hash_ids"]) for row in rows]


def synthetic(seed: int = 0, count: int = 12_000) -> list[Row]:
    """Return conversations in Mooncake's form: long prompts, turns that repeat all before them."""
    rng = random.Random(seed)
    next_id = 1
    open_chats: deque[list[int]] = deque(maxlen=200)
    rows = []
    for _ in range(count):
        ids = list(rng.choice(open_chats)) if open_chats and rng.random() < 0.35 else [0]
        num_new = min(120, max(1, int(rng.lognormvariate(2.4, 1.0))))
        ids += range(next_id, next_id + num_new)
        next_id += num_new
        open_chats.append(ids[:-1])
        tail = rng.randrange(1, TRACE_BLOCK + 1)
        num_output = min(2000, max(1, int(rng.lognormvariate(5.5, 0.8))))
        rows.append(((len(ids) - 1) * TRACE_BLOCK + tail, num_output, ids))
    return rows


def jobs(rows: Sequence[Row], *, scale: int, block_size: int) -> list[Job]:
    """Return the requests with every length divided by `scale`, so that small pools mean something.

    A hash id becomes as many block names as its scaled tokens fill.
    """
    per_id = TRACE_BLOCK // scale // block_size
    assert per_id * scale * block_size == TRACE_BLOCK, (scale, block_size)
    made = []
    for index, (num_input, num_output, ids) in enumerate(rows):
        num_prompt = max(2, num_input // scale)
        num_answer = max(1, num_output // scale)
        num_full = min(num_prompt // block_size, len(ids) * per_id)
        names = [_name(0, ids[i // per_id], i % per_id) for i in range(num_full)]
        num_named = (num_prompt + num_answer) // block_size
        names += [_name(1, index, i) for i in range(num_full, num_named)]
        made.append(Job(RequestId(f"r{index}"), num_prompt, num_answer, tuple(names)))
    return made


def _name(kind: int, number: int, part: int) -> BlockHash:
    return BlockHash(b"%c%010d%05d" % (kind, number, part))
