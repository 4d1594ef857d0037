"""Model a worker's cache and the memory behind it, so that a test can say what each slot must hold.

Called by the tests of `penstock/kv/`; knows no request's fate, only what is readable now.
"""

from dataclasses import dataclass, field

import numpy as np

from penstock.core.block import KVGroup, KVLayout, extend_hashes
from penstock.core.types import RequestId
from penstock.kv.allocator import run_lengths
from penstock.kv.cache import KVCache

BLOCK_SIZE = 4
GROUPS = (KVGroup((0,)), KVGroup((1,), window=6), KVGroup((2,), window=11))
LAYOUT = KVLayout("test", GROUPS, 1, 1, BLOCK_SIZE, "float32")
NUM_BLOCKS = (24, 14, 12)
CHUNK_TOKENS = 9
EMPTY = 0


def hashes_of(token_ids):
    hashes = []
    extend_hashes(hashes, token_ids, BLOCK_SIZE, "")
    return hashes


def num_held(kv, request_id):
    """Return how many blocks a request holds, per group."""
    return tuple(map(len, kv.held(request_id)))


def num_runs(kv, request_id):
    """Return in how many runs of adjacent blocks a request lies, per group."""
    return tuple(len(run_lengths(block_ids)) for block_ids in kv.held(request_id))


def active_blocks(kv):
    """Return the blocks that requests hold, per group."""
    return tuple(group.pool.num_active for group in kv.groups)


@dataclass
class Sequence:
    """A request of the model: its tokens, and how many of them have KV."""

    request_id: RequestId
    token_ids: list[int]
    num_computed: int = 0
    is_pulling: bool = False
    pull: object = None

    @property
    def hashes(self):
        return hashes_of(self.token_ids)


@dataclass
class Node:
    """A worker of the model: a cache, and a memory that says of which tokens each slot has the KV.

    The KV of a token depends on all tokens up to it, so a slot holds a number for that prefix.
    """

    kv: KVCache = field(default_factory=lambda: KVCache(LAYOUT, NUM_BLOCKS))
    sequences: dict[RequestId, Sequence] = field(default_factory=dict)

    def __post_init__(self):
        self.memory = [np.full((count, BLOCK_SIZE), EMPTY) for count in NUM_BLOCKS]

    def entries(self, sequence, num_tokens):
        return [table[0] for table in self.kv.tables([sequence.request_id], num_tokens)]

    def write(self, sequence, begin, end):
        """Compute tokens `[begin, end)`; first read what they look at."""
        self.assert_readable(sequence, begin)
        for memory, table in zip(self.memory, self.entries(sequence, end), strict=True):
            for position in range(begin, end):
                block_id = table[position // BLOCK_SIZE]
                memory[block_id, position % BLOCK_SIZE] = content(sequence.token_ids, position)

    def assert_readable(self, sequence, num_computed):
        """The token after `num_computed` tokens finds the KV of all it looks at, in every group."""
        tables = self.entries(sequence, num_computed)
        for group, memory, table in zip(GROUPS, self.memory, tables, strict=True):
            first = max(0, num_computed - group.window + 1) if group.window else 0
            for position in range(first, num_computed):
                found = memory[table[position // BLOCK_SIZE], position % BLOCK_SIZE]
                assert found == content(sequence.token_ids, position), (group, position)


def first_needed(group, num_tokens):
    return max(0, num_tokens - group.window + 1) // BLOCK_SIZE if group.window else 0


def content(token_ids, position):
    return hash(tuple(token_ids[: position + 1])) | 1


def snapshot(kv, request_ids):
    tables = tuple(t.tolist() for t in kv.tables(request_ids, 40))
    return kv.free_blocks, kv.cached_blocks, active_blocks(kv), tables


def prefilled(num_tokens, num_blocks=(64, 32, 32)):
    """Make a cache with one request "a" of that many computed tokens."""
    kv = KVCache(LAYOUT, num_blocks)
    token_ids = list(range(num_tokens))
    kv.open("a", hashes_of(token_ids), num_tokens)
    assert kv.grow("a", num_tokens)
    kv.advance("a", num_tokens, hashes_of(token_ids))
    return kv, token_ids
