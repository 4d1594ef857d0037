import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.core.block import KVGroup, KVLayout
from penstock.core.types import RequestId
from penstock.kv.cache import KVCache
from tests.kv.cache_model import (
    BLOCK_SIZE,
    CHUNK_TOKENS,
    GROUPS,
    LAYOUT,
    NUM_BLOCKS,
    Node,
    Sequence,
    active_blocks,
    first_needed,
    hashes_of,
    num_held,
    num_runs,
    snapshot,
)


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
        for group, held in zip(GROUPS[1:], num_held(node.kv, sequence.request_id)[1:], strict=True):
            num_slots = node.kv.capacity(sequence.request_id) // BLOCK_SIZE
            assert held == num_slots - first_needed(group, end)
            assert held <= -(-group.window // BLOCK_SIZE) + -(-CHUNK_TOKENS // BLOCK_SIZE)
        return True

    def grow(self, node, sequence, num_tokens):
        request_id = sequence.request_id
        before = snapshot(node.kv, node.sequences)
        room = [f + c for f, c in zip(node.kv.free_blocks, node.kv.cached_blocks, strict=True)]
        wanted = -(-num_tokens // BLOCK_SIZE)
        held = [len(h.block_ids) for h in node.kv._holdings[request_id].groups]
        can_grow = all(wanted - n <= r for n, r in zip(held, room, strict=True))
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
        before = num_held(node.kv, sequence.request_id)
        room = [f + c for f, c in zip(node.kv.free_blocks, node.kv.cached_blocks, strict=True)]
        wanted = max(0, -(-len(sequence.token_ids) // BLOCK_SIZE) - before[0])

        assert node.kv.reserve(sequence.request_id, len(sequence.token_ids)) == (wanted <= room[0])

        held = num_held(node.kv, sequence.request_id)
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

        runs = self.prefill.kv.runs(sequence.request_id, num_tokens)
        adoption = self.decode.kv.adopt(sequence.request_id, sequence.hashes, num_tokens, runs)

        if adoption is None:
            assert snapshot(self.decode.kv, self.decode.sequences) == before
            return
        assert adoption.cached_tokens <= num_tokens
        pulls = adoption.pulls(offered)
        for offer, pull, adopted in zip(offered, pulls, adoption.groups, strict=True):
            assert len(pull.source_ids) == len(adopted.destination_of)
            assert set(pull.source_ids) <= set(offer.block_ids)
            assert len(pull.source_ids) == len(pull.destination_ids)
        copy = Sequence(sequence.request_id, list(sequence.token_ids), num_tokens, True, pulls)
        self.decode.sequences[sequence.request_id] = copy
        sequence.is_pulling = True

    def pulling(self):
        return [s for s in self.decode.sequences.values() if s.is_pulling]

    @precondition(lambda self: self.pulling())
    @rule(data=st.data())
    def land(self, data):
        sequence = data.draw(st.sampled_from(self.pulling()))
        memories = zip(self.prefill.memory, self.decode.memory, strict=True)
        for (source, destination), pull in zip(memories, sequence.pull, strict=True):
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
                node.kv.free_blocks, node.kv.cached_blocks, active_blocks(node.kv), strict=True
            )
            assert tuple(map(sum, counts)) == NUM_BLOCKS

    def teardown(self):
        for node in (self.prefill, self.decode):
            for request_id in list(node.sequences):
                self.close(node, request_id)
            assert active_blocks(node.kv) == (0, 0, 0)
            for group, count in zip(node.kv.groups, NUM_BLOCKS, strict=True):
                assert sorted(group.pool.allocate(count)) == list(range(count))


CacheMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=50)
TestCache = CacheMachine.TestCase


def test_a_prompt_computed_in_chunks_lies_in_one_run_when_it_was_reserved():
    kv = KVCache(LAYOUT, (64, 32, 32))
    for request_id in ("a", "b"):
        kv.open(request_id, [], 0)
        assert kv.reserve(request_id, 60)
    for end in range(10, 70, 10):
        for request_id in ("a", "b"):
            assert kv.grow(request_id, end)
            kv.advance(request_id, end, [])

    assert num_runs(kv, "a")[0] == num_runs(kv, "b")[0] == 1


def test_without_prefix_caching_nothing_is_kept():
    kv = KVCache(LAYOUT, (64, 32, 32), is_prefix_caching=False)
    hashes = hashes_of(list(range(40)))
    for _ in range(2):
        assert kv.open("a", hashes, 40) == 0
        assert kv.grow("a", 40)
        kv.advance("a", 40, hashes)
        assert num_held(kv, "a") == (10, 2, 3)
        kv.close("a")
    assert kv.free_blocks == (64, 32, 32)


def test_fragmentation_is_what_lies_outside_the_longest_run_of_writable_blocks():
    kv = KVCache(LAYOUT, (64, 32, 32), is_prefix_caching=False)
    assert kv.fragmentation == (0, 0, 0)
    for name in "abc":
        kv.open(name, [], 0)
        kv.grow(name, 16)
    kv.close("b")  # blocks 4 to 7 between a and c; 52 and 20 behind c
    assert kv.fragmentation == pytest.approx((4 / 56, 4 / 24, 4 / 24))


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


def test_a_window_keeps_the_first_block_and_the_latest_and_gives_the_rest_back():
    cache = KVCache(KVLayout("m", (KVGroup((0,)),), 1, 16, 4, "float32"), [20])
    name = RequestId("windowed")
    other = RequestId("other")
    assert cache.open(name, [], 0) == 0
    assert cache.open(other, [], 0) == 0
    assert cache.grow(other, 8)
    assert cache.grow(name, 40)
    (before,) = cache.held(name)
    assert cache.gaps([name, other]) is None
    cache.advance(name, 40, [], window=9)
    # The last token may stand alone in its block: 9 tokens reach into three blocks.
    (held,) = cache.held(name)
    assert held == [before[0], *before[-3:]]
    assert cache.gaps([name, other]).tolist() == [[0, 1, 6]]
    (table,) = cache.tables([name], 40)
    assert table[0].tolist() == [before[0], 0, 0, 0, 0, 0, 0, *before[-3:]]
    assert cache.free_blocks == (20 - 2 - 4,)
    assert cache.grow(name, 44)
    cache.advance(name, 44, [], window=9)
    assert cache.gaps([other, name]).tolist() == [[1, 1, 7]]
    cache.check()
    cache.close(name)
    assert cache.gaps([other]) is None
    cache.close(other)
    cache.check()
    assert cache.free_blocks == (20,)


def test_what_another_has_computed_meanwhile_is_taken_up():
    kv = KVCache(KVLayout("test", (KVGroup((0,)),), 1, 1, BLOCK_SIZE, "float32"), (16,))
    hashes = hashes_of(list(range(21)))
    for request_id in ("slow", "quick"):
        assert kv.open(request_id, hashes, 20) == 0
        assert kv.reserve(request_id, 21)
    kv.advance("slow", 6, hashes)
    assert kv.take_up("slow", hashes, 6, 20) == 6  # nothing has come
    kv.advance("quick", 14, hashes)
    before = kv.free_blocks[0]

    assert kv.take_up("slow", hashes, 6, 20) == 12

    kv.check()
    slow, quick = (kv.held(request_id)[0] for request_id in ("slow", "quick"))
    assert slow[1:3] == quick[1:3]
    assert slow[0] != quick[0]
    assert len(slow) == len(quick) == 6
    assert kv.free_blocks[0] == before + 2  # what was to be filled is given back
    assert kv.take_up("slow", hashes, 12, 15) == 12
    for request_id in ("slow", "quick"):
        kv.close(request_id)
    assert active_blocks(kv) == (0,)


def test_where_a_window_slides_nothing_is_taken_up():
    kv = KVCache(LAYOUT, NUM_BLOCKS)
    hashes = hashes_of(list(range(20)))
    for request_id in ("slow", "quick"):
        kv.open(request_id, hashes, 20)
        assert kv.grow(request_id, 20)
    kv.advance("quick", 20, hashes)
    assert kv.take_up("slow", hashes, 4, 19) == 4
