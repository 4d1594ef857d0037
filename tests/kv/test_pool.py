from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.core.block import BLOCK_TRANSITIONS, BlockState
from penstock.core.types import BlockHash
from penstock.kv.allocator import run_lengths
from penstock.kv.pool import BlockPool

NUM_BLOCKS = 16


class PoolMachine(RuleBasedStateMachine):
    """Holders take, name, share and drop blocks; lists and a dictionary say what must be true.

    A block's contents are its name: what `find` returns must still have them.
    """

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.tables = []  # of lists of blocks
        self.contents = {}  # block -> hash, while it is named
        self.num_names = 0
        self.states = [BlockState.FREE] * NUM_BLOCKS
        self.handed_out = [0] * NUM_BLOCKS

    def holders(self, block_id):
        return sum(table.count(block_id) for table in self.tables)

    def taken(self, block_ids):
        for block_id in block_ids:
            assert self.holders(block_id) == 0
            self.contents.pop(block_id, None)
            self.handed_out[block_id] += 1
        self.tables.append(list(block_ids))

    @rule(count=st.integers(1, NUM_BLOCKS), is_near=st.booleans())
    def allocate(self, count, is_near):
        available = self.pool.num_available
        snapshot = dict(self.contents), [self.pool.state(b) for b in range(NUM_BLOCKS)]
        after = self.tables[-1][-1] if is_near and self.tables else None
        block_ids = self.pool.allocate(count, after=after)
        if count > available:
            assert block_ids is None
            assert snapshot == (
                self.contents,
                [self.pool.state(b) for b in range(NUM_BLOCKS)],
            )
            return
        assert len(set(block_ids)) == count
        self.taken(block_ids)
        self.forget_evicted()

    @rule(runs=st.lists(st.integers(1, 5), min_size=1, max_size=4))
    def allocate_like(self, runs):
        available = self.pool.num_available
        block_ids = self.pool.allocate_like(runs)
        assert (block_ids is None) == (sum(runs) > available)
        if block_ids is not None:
            self.taken(block_ids)
            self.forget_evicted()

    def forget_evicted(self):
        """Only idle blocks may have lost their names, and no more than were needed."""
        for block_id, block_hash in list(self.contents.items()):
            if self.pool.prefix_cache.find(block_hash) is None:
                assert not self.holders(block_id), f"block {block_id} was evicted while held"
                del self.contents[block_id]

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), is_duplicate=st.booleans())
    def name(self, data, is_duplicate):
        table = data.draw(st.sampled_from(self.tables))
        unnamed = [b for b in table if b not in self.contents]
        if not unnamed:
            return
        block_id = unnamed[0]
        if is_duplicate and self.contents:
            taken = data.draw(st.sampled_from(sorted(self.contents.values())))
            self.pool.insert(block_id, taken)
            assert self.pool.prefix_cache.find(taken) != block_id
            return
        self.num_names += 1
        block_hash = BlockHash(b"%d" % self.num_names)
        self.pool.insert(block_id, block_hash)
        self.contents[block_id] = block_hash

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def share(self, data):
        block_hash = data.draw(st.sampled_from(sorted(self.contents.values())))
        block_id = self.pool.prefix_cache.find(block_hash)
        assert self.contents[block_id] == block_hash
        self.pool.hold([block_id])
        self.tables.append([block_id])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data):
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.pool.release(self.tables.pop(index))

    @invariant()
    def balances(self):
        self.pool.check()
        active = {b for table in self.tables for b in table}
        cached = set(self.contents) - active
        assert self.pool.num_active == len(active)
        assert self.pool.num_cached == len(cached)
        assert self.pool.num_free == NUM_BLOCKS - len(active) - len(cached)
        for block_id in range(NUM_BLOCKS):
            assert self.pool.num_holders(block_id) == self.holders(block_id)
            assert self.pool.generations([block_id]) == (self.handed_out[block_id],)
            self.follow(block_id)
        for block_id, block_hash in self.contents.items():
            assert self.pool.prefix_cache.find(block_hash) == block_id

    def follow(self, block_id):
        before, after = self.states[block_id], self.pool.state(block_id)
        assert before == after or after in BLOCK_TRANSITIONS[before], (before, after)
        self.states[block_id] = after

    def teardown(self):
        for table in self.tables:
            self.pool.release(table)
        self.pool.check()
        assert self.pool.num_active == 0
        assert self.pool.num_available == NUM_BLOCKS


PoolMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=40)
TestPool = PoolMachine.TestCase


def test_releasing_what_nobody_holds_is_a_bug():
    pool = BlockPool(4)
    block_ids = pool.allocate(2)
    pool.release(block_ids)

    with pytest.raises(AssertionError):
        pool.release(block_ids)


def test_a_prompt_gets_one_run_in_a_pool_full_of_cached_blocks():
    # 8 requests of 8 blocks were there at once, and have left 7 cached blocks and a free one each.
    pool = BlockPool(64)
    tables = [pool.allocate(8) for _ in range(8)]
    for request, block_ids in enumerate(tables):
        for i in range(7):
            pool.insert(block_ids[i], BlockHash(b"%d-%d" % (request, i)))
    for block_ids in tables:
        pool.release(block_ids)
    assert (pool.num_free, pool.allocator.num_segments) == (8, 8)

    # 24 are free or spare now: the 8, and 16 of the oldest requests.
    assert run_lengths(pool.allocate(8)) == [8]
    assert pool.num_cached == 49  # one of the 8 was free
    assert pool.prefix_cache.find(BlockHash(b"0-6")) is None
    assert pool.prefix_cache.find(BlockHash(b"3-6")) is not None
    pool.check()


def test_prompts_keep_getting_long_runs_while_the_cache_is_full():
    # Requests of 10 to 80 blocks come and go, some share a prefix; all that they leave is cached.
    random = Random(1)
    pool = BlockPool(512)
    tables, chains, runs = [], [[]], []
    for request in range(300):
        while len(tables) > 4:
            pool.release(tables.pop(random.randrange(len(tables))))
        shared = random.choice(chains[-20:])[: random.choice((0, 10))]
        hits = shared[: pool.prefix_cache.longest_prefix(shared, len(shared))]
        table = [pool.prefix_cache.find(block_hash) for block_hash in hits]
        pool.hold(table)
        new = pool.allocate(random.randint(10, 80))
        names = [BlockHash(b"%d-%d" % (request, i)) for i in range(len(new) - 1)]
        for block_id, block_hash in zip(new, names, strict=False):
            pool.insert(block_id, block_hash)
        tables.append(table + new)
        chains.append(hits + names)
        if request >= 100:
            runs.append(len(run_lengths(new)))
    pool.check()
    assert pool.num_cached > 128
    assert sum(runs) / len(runs) < 2
