from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.core.block import KVGroup, KVLayout, extend_hashes
from penstock.core.events import GroupBlocks, Span
from penstock.core.types import RequestId
from penstock.kv.cache import KVCache
from penstock.transfer.plan import align

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
    return kv.free_blocks, kv.cached_blocks, kv.active_blocks, tables


class CacheMachine(RuleBasedStateMachine):
    """A prefill worker and a decode worker serve, hand over, preempt and drop requests.

    Whatever a token looks at must be there, in the worker's memory, whenever a step would read it.
    """

    def __init__(self):
        super().__init__()
        self.prefill, self.decode = Node(), Node()
        self.num_requests = 0

    def running(self, node):
        return [s for s in node.sequences.values() if not s.is_pulling]

    def longest_usable(self, node, hashes, limit):
        """Search from above for a prefix that all groups have, by definition."""
        for length in range(limit, 0, -1):
            needed = [range(first_needed(group, length * BLOCK_SIZE), length) for group in GROUPS]
            caches = [group.pool.prefix_cache for group in node.kv.groups]
            if all(
                cache.find(hashes[i]) is not None
                for cache, indexes in zip(caches, needed, strict=True)
                for i in indexes
            ):
                return length
        return 0

    @rule(
        is_prefill=st.booleans(),
        # Few choices, and early ones: prefixes are shared.
        branches=st.lists(st.integers(1, 2), min_size=1, max_size=4),
        tail=st.integers(1, BLOCK_SIZE),
    )
    def open(self, is_prefill, branches, tail):
        node = self.prefill if is_prefill else self.decode
        token_ids = [b for b in branches for _ in range(BLOCK_SIZE + 2)] + [9] * tail
        self.num_requests += 1
        sequence = Sequence(RequestId(f"r{self.num_requests}"), token_ids)
        limit = (len(token_ids) - 1) // BLOCK_SIZE
        expected = self.longest_usable(node, sequence.hashes, limit) * BLOCK_SIZE

        num_cached = node.kv.open(sequence.request_id, sequence.hashes, len(token_ids) - 1)

        assert num_cached == expected
        assert node.kv.capacity(sequence.request_id) == num_cached
        sequence.num_computed = num_cached
        node.sequences[sequence.request_id] = sequence
        node.assert_readable(sequence, num_cached)

    @rule(data=st.data(), is_prefill=st.booleans(), chunk=st.integers(1, CHUNK_TOKENS))
    def compute(self, data, is_prefill, chunk):
        node = self.prefill if is_prefill else self.decode
        if not self.running(node):
            return
        sequence = data.draw(st.sampled_from(self.running(node)))
        begin = sequence.num_computed
        end = min(begin + chunk, len(sequence.token_ids))
        if end == begin:  # decode: sample a token
            sequence.token_ids.append(data.draw(st.integers(1, 3)))
            end += 1
        self.step(node, sequence, end)

    def step(self, node, sequence, end):
        if not self.grow(node, sequence, end):
            return False
        node.write(sequence, sequence.num_computed, end)
        sequence.num_computed = end
        node.kv.advance(sequence.request_id, end, sequence.hashes)
        node.assert_readable(sequence, end)
        for group, held in zip(GROUPS[1:], node.kv.num_held(sequence.request_id)[1:], strict=True):
            num_slots = node.kv.capacity(sequence.request_id) // BLOCK_SIZE
            assert held == num_slots - first_needed(group, end)
            assert held <= -(-group.window // BLOCK_SIZE) + -(-CHUNK_TOKENS // BLOCK_SIZE)
        return True

    def grow(self, node, sequence, num_tokens):
        request_id = sequence.request_id
        before = snapshot(node.kv, node.sequences)
        can_grow = node.kv.can_grow(request_id, num_tokens)
        missing = -(-num_tokens // BLOCK_SIZE) * BLOCK_SIZE > node.kv.capacity(request_id)

        has_grown = node.kv.grow(request_id, num_tokens)

        assert has_grown == can_grow
        if has_grown:
            assert node.kv.capacity(request_id) >= num_tokens
        if not has_grown or not missing:
            assert snapshot(node.kv, node.sequences) == before
        return has_grown

    @precondition(lambda self: self.running(self.prefill))
    @rule(data=st.data())
    def reserve(self, data):
        node = self.prefill
        sequence = data.draw(st.sampled_from(self.running(node)))
        before = node.kv.num_held(sequence.request_id)
        room = [f + c for f, c in zip(node.kv.free_blocks, node.kv.cached_blocks, strict=True)]
        wanted = max(0, -(-len(sequence.token_ids) // BLOCK_SIZE) - before[0])

        assert node.kv.reserve(sequence.request_id, len(sequence.token_ids)) == (wanted <= room[0])

        held = node.kv.num_held(sequence.request_id)
        assert held[1:] == before[1:]
        assert held[0] == before[0] + (wanted if wanted <= room[0] else 0)

    @precondition(lambda self: self.running(self.prefill))
    @rule(data=st.data())
    def hand_over(self, data):
        sequence = data.draw(st.sampled_from(self.running(self.prefill)))
        num_tokens = len(sequence.token_ids) - 1
        while sequence.num_computed < num_tokens:
            end = min(num_tokens, sequence.num_computed + CHUNK_TOKENS)
            if not self.step(self.prefill, sequence, end):
                return
        if sequence.num_computed > num_tokens:
            return
        offered = self.prefill.kv.offer(sequence.request_id, num_tokens)
        before = snapshot(self.decode.kv, self.decode.sequences)

        adoption = self.decode.kv.adopt(sequence.request_id, sequence.hashes, num_tokens, offered)

        if adoption is None:
            assert snapshot(self.decode.kv, self.decode.sequences) == before
            return
        assert adoption.cached_tokens <= num_tokens
        for offer, pull in zip(offered, adoption.pulls, strict=True):
            assert set(pull.source_ids) <= set(offer.block_ids)
            assert len(pull.source_ids) == len(pull.destination_ids)
        copy = Sequence(sequence.request_id, list(sequence.token_ids), num_tokens, True, adoption)
        self.decode.sequences[sequence.request_id] = copy
        sequence.is_pulling = True

    def pulling(self):
        return [s for s in self.decode.sequences.values() if s.is_pulling]

    @precondition(lambda self: self.pulling())
    @rule(data=st.data())
    def land(self, data):
        sequence = data.draw(st.sampled_from(self.pulling()))
        memories = zip(self.prefill.memory, self.decode.memory, strict=True)
        for (source, destination), pull in zip(memories, sequence.pull.pulls, strict=True):
            destination[list(pull.destination_ids)] = source[list(pull.source_ids)]
        self.decode.kv.advance(sequence.request_id, sequence.num_computed, sequence.hashes)
        sequence.is_pulling = False
        self.decode.assert_readable(sequence, sequence.num_computed)
        self.close(self.prefill, sequence.request_id)

    @precondition(lambda self: self.pulling())
    @rule(data=st.data())
    def fail_pull(self, data):
        sequence = data.draw(st.sampled_from(self.pulling()))
        indexed = [g.pool.prefix_cache.num_indexed for g in self.decode.kv.groups]
        self.close(self.decode, sequence.request_id)
        assert indexed == [g.pool.prefix_cache.num_indexed for g in self.decode.kv.groups]
        self.prefill.sequences[sequence.request_id].is_pulling = False

    @rule(data=st.data(), is_prefill=st.booleans())
    def drop(self, data, is_prefill):
        node = self.prefill if is_prefill else self.decode
        if self.running(node):
            self.close(node, data.draw(st.sampled_from(self.running(node))).request_id)

    def close(self, node, request_id):
        node.kv.close(request_id)
        del node.sequences[request_id]

    @invariant()
    def balances(self):
        for node in (self.prefill, self.decode):
            node.kv.check()
            assert node.kv.num_requests == len(node.sequences)
            counts = zip(
                node.kv.free_blocks, node.kv.cached_blocks, node.kv.active_blocks, strict=True
            )
            assert tuple(map(sum, counts)) == NUM_BLOCKS

    def teardown(self):
        for node in (self.prefill, self.decode):
            for request_id in list(node.sequences):
                self.close(node, request_id)
            assert node.kv.active_blocks == (0, 0, 0)
            for group, count in zip(node.kv.groups, NUM_BLOCKS, strict=True):
                assert sorted(group.pool.allocate(count)) == list(range(count))


CacheMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=50)
TestCache = CacheMachine.TestCase


def prefilled(num_tokens, num_blocks=(64, 32, 32)):
    """Make a cache with one request "a" of that many computed tokens."""
    kv = KVCache(LAYOUT, num_blocks)
    token_ids = list(range(num_tokens))
    kv.open("a", hashes_of(token_ids), num_tokens)
    assert kv.grow("a", num_tokens)
    kv.advance("a", num_tokens, hashes_of(token_ids))
    return kv, token_ids


def test_a_sliding_group_offers_only_its_window():
    kv, _ = prefilled(30)

    offered = kv.offer("a", 30)

    assert [o.first for o in offered] == [0, 25 // BLOCK_SIZE, 20 // BLOCK_SIZE]
    assert [o.first + len(o.block_ids) for o in offered] == [8, 8, 8]


def test_a_prompt_computed_in_chunks_lies_in_one_run_when_it_was_reserved():
    kv = KVCache(LAYOUT, (64, 32, 32))
    for request_id in ("a", "b"):
        kv.open(request_id, [], 0)
        assert kv.reserve(request_id, 60)
    for end in range(10, 70, 10):
        for request_id in ("a", "b"):
            assert kv.grow(request_id, end)
            kv.advance(request_id, end, [])

    assert kv.num_runs("a")[0] == kv.num_runs("b")[0] == 1


def test_an_adopted_request_lies_in_runs_like_the_peers():
    source, token_ids = prefilled(40)
    destination = KVCache(LAYOUT, (64, 32, 32))

    adoption = destination.adopt("a", hashes_of(token_ids), 39, source.offer("a", 39))

    assert adoption.cached_tokens == 0
    assert destination.num_runs("a") == (1, 1, 1)


def test_a_second_request_with_the_same_prefix_pulls_only_the_rest():
    source, token_ids = prefilled(40)
    destination = KVCache(LAYOUT, (64, 32, 32))
    destination.adopt("a", hashes_of(token_ids), 39, source.offer("a", 39))
    destination.advance("a", 39, hashes_of(token_ids))

    adoption = destination.adopt("b", hashes_of(token_ids), 39, source.offer("a", 39))

    assert adoption.cached_tokens == 36
    assert [len(pull.source_ids) for pull in adoption.pulls] == [1, 1, 1]


def test_groups_that_want_different_prefixes_agree_on_a_shorter_one():
    kv, token_ids = prefilled(40)
    kv.close("a")
    # Group 2 has no block 8, so its prefix has 8 blocks; group 1 has not the last one of these 8.
    lose(kv, 2, named=hashes_of(token_ids)[8])
    lose(kv, 1, named=hashes_of(token_ids)[7])

    assert kv.open("b", hashes_of(token_ids), 40) == 7 * BLOCK_SIZE


def lose(kv, group, named):
    """Overwrite the idle block with this name."""
    pool = kv.groups[group].pool
    pool.allocator.free(pool.prefix_cache.give_up(pool.num_blocks))
    pool.prefix_cache.forget([pool.prefix_cache.find(named)])


def test_a_block_in_the_middle_that_is_here_is_not_pulled():
    source, token_ids = prefilled(40)
    destination = KVCache(LAYOUT, (64, 32, 32))
    destination.adopt("a", hashes_of(token_ids), 39, source.offer("a", 39))
    destination.advance("a", 39, hashes_of(token_ids))
    destination.close("a")
    lose(destination, 0, named=hashes_of(token_ids)[2])

    adoption = destination.adopt("b", hashes_of(token_ids), 39, source.offer("a", 39))

    assert adoption.cached_tokens == 8
    assert len(adoption.pulls[0].source_ids) == 2
    destination.check()


def test_without_prefix_caching_nothing_is_kept():
    kv = KVCache(LAYOUT, (64, 32, 32), is_prefix_caching=False)
    hashes = hashes_of(list(range(40)))
    for _ in range(2):
        assert kv.open("a", hashes, 40) == 0
        assert kv.grow("a", 40)
        kv.advance("a", 40, hashes)
        assert kv.num_held("a") == (10, 2, 3)
        kv.close("a")
    assert kv.free_blocks == (64, 32, 32)


def test_tables_grow_beyond_their_first_size():
    kv = KVCache(LAYOUT, (600, 600, 600), is_prefix_caching=False)
    names = [f"r{i}" for i in range(70)]
    for name in names:
        kv.open(name, [], 0)
        assert kv.grow(name, 8)
    assert kv.grow("r69", 400)

    tables = kv.tables(names, 400)

    assert [t.shape for t in tables] == [(70, 100)] * 3
    assert len(set(tables[0][69].tolist())) == 100
    assert not tables[0][0, 2:].any()
    tables[0][:] = 7  # a copy
    kv.check()


def test_a_row_is_clean_when_it_is_used_again():
    kv = KVCache(LAYOUT, (64, 32, 32), is_prefix_caching=False)
    kv.open("a", [], 0)
    kv.grow("a", 40)
    kv.close("a")
    kv.open("b", [], 0)
    kv.grow("b", 4)

    assert not any(table[0, 1:].any() for table in kv.tables(["b"], 40))


def test_opening_twice_is_a_bug():
    kv = KVCache(LAYOUT, (64, 32, 32))
    kv.open("a", [], 0)

    with pytest.raises(AssertionError):
        kv.open("a", [], 0)


def test_computing_beyond_the_slots_is_a_bug():
    kv = KVCache(LAYOUT, (64, 32, 32))
    kv.open("a", [], 0)
    kv.grow("a", 4)

    with pytest.raises(AssertionError):
        kv.advance("a", 5, [])


def test_blocks_that_are_hit_are_no_room_for_the_rest():
    source, token_ids = prefilled(40)
    destination = KVCache(LAYOUT, (10, 32, 32))
    destination.adopt("a", hashes_of(token_ids), 39, source.offer("a", 39))
    destination.advance("a", 39, hashes_of(token_ids))
    destination.close("a")
    destination.open("b", [], 0)
    assert destination.grow("b", 4)
    # 9 of 10 blocks are cached, all of them hits, and the request needs one more.
    before = snapshot(destination, ["b"])

    assert destination.adopt("c", hashes_of(token_ids), 39, source.offer("a", 39)) is None

    assert snapshot(destination, ["b"]) == before


def test_an_offer_that_does_not_cover_its_tokens_is_a_bug():
    source, token_ids = prefilled(40)
    destination = KVCache(LAYOUT, (64, 32, 32))

    with pytest.raises(AssertionError):
        destination.adopt("a", hashes_of(token_ids), 39, source.offer("a", 35))


def test_a_peers_runs_are_reproduced():
    # The peer has the request in runs of 5, 4 and 1; here only segments of 4, 1 and 5 are free.
    source, token_ids = prefilled(40)
    runs = [10, 11, 12, 13, 14, 30, 31, 32, 33, 50]
    offered = (GroupBlocks(0, tuple(runs)), *source.offer("a", 39)[1:])
    destination = KVCache(LAYOUT, (12, 32, 32))
    destination.groups[0].pool.allocate(12)
    destination.groups[0].pool.release([0, 1, 2, 3, 5, 7, 8, 9, 10, 11])

    adoption = destination.adopt("a", hashes_of(token_ids), 39, offered)

    spans = align(adoption.pulls[0].source_ids, adoption.pulls[0].destination_ids)
    assert spans == [Span(10, 7, 5), Span(30, 0, 4), Span(50, 5, 1)]


def test_a_prefix_is_given_up_from_its_end():
    kv, token_ids = prefilled(40)
    kv.close("a")
    pool = kv.groups[0].pool
    pool.prefix_cache.forget(pool.prefix_cache.give_up(4))

    assert pool.prefix_cache.longest_prefix(hashes_of(token_ids), 10) == 6
