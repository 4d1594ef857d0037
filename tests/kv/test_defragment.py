"""Cached blocks are moved so that what is free becomes one run; nothing else changes."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from penstock.core.block import BlockState
from penstock.core.types import BlockHash, BlockId, Digest
from penstock.kv.defragment import plan_relocation
from penstock.kv.pool import BlockPool, Relocation
from tests.kv.test_pool import NUM_BLOCKS, PoolMachine

FREE, KEPT, SPARE, HELD = ".", "k", "s", "H"
MANY = 1 << 30


def pool_of(picture):
    """Make a pool that looks like this: free, kept, spare or held, a sign for each block."""
    pool = BlockPool(len(picture))
    pool.allocate(len(picture))
    blocks = [BlockId(b) for b in range(len(picture))]
    for sign in (SPARE, KEPT):
        chosen = [b for b in blocks if picture[b] == sign]
        for block_id in chosen:
            pool.insert(block_id, name_of(block_id))
            pool.note_digest(block_id, Digest(1000 + block_id))
        pool.release(chosen)
        if sign == SPARE:
            pool.allocator.free(pool.prefix_cache.give_up(len(chosen)))
    pool.release([b for b in blocks if picture[b] == FREE])
    assert picture_of(pool) == picture
    return pool


def picture_of(pool):
    def sign(block_id):
        if pool.state(block_id) is BlockState.ACTIVE:
            return HELD
        if pool.state(block_id) is BlockState.FREE:
            return FREE
        return SPARE if pool.prefix_cache.is_spare(block_id) else KEPT

    return "".join(sign(BlockId(b)) for b in range(pool.num_blocks))


def name_of(block_id):
    return BlockHash(b"name %d" % block_id)


def carry_out(pool, moves_max, wanted=MANY, may_evict=False):
    plan = plan_relocation(pool, moves_max, wanted=wanted, may_evict=may_evict)
    pool.begin_relocation(plan)
    pool.check()
    assert pool.end_relocation(plan) == len(plan)
    pool.check()
    return plan


# --- the plan


def test_what_stands_between_goes_where_it_closes_a_hole():
    pool = pool_of("H..k...H.H")
    assert carry_out(pool, 8) == [Relocation(3, 8)]
    assert picture_of(pool) == "H......HkH"
    assert pool.prefix_cache.find(name_of(3)) == 8
    assert pool.digest(8) == 1003


def test_the_longest_run_that_the_moves_allow_is_chosen():
    # Two moves make 6 of the left stretch, one makes 5 of the right one.
    picture = "H..k.k.H..k..H.H.H"
    assert len(carry_out(pool_of(picture), 1)) == 1
    for moves_max, longest in ((1, 5), (2, 6), (3, 6)):
        pool = pool_of(picture)
        carry_out(pool, moves_max)
        assert pool.allocator.largest_free == longest


def test_no_more_is_moved_than_what_is_wanted_takes():
    picture = "H..k.k.H..k..H.H.H"
    pool = pool_of(picture)
    assert carry_out(pool, 8, wanted=2) == []
    assert len(carry_out(pool, 8, wanted=4)) == 1
    assert pool.allocator.largest_free >= 4
    assert carry_out(pool, 8, wanted=4) == []


def test_few_moves_are_made_where_few_reach_what_is_wanted():
    # All of it would take three moves; 9 blocks need one, at the right.
    pool = pool_of("H.k.k.k.......H....H")
    assert carry_out(pool, 8, wanted=9) == [Relocation(6, 1)]
    assert picture_of(pool) == "Hkk.k.........H....H"


def test_where_there_is_no_other_room_a_run_gives_some_of_its_own():
    pool = pool_of(".k..kk..k...kkk.H")
    carry_out(pool, 3)
    assert pool.allocator.largest_free == 9


def test_what_is_held_is_not_moved_and_not_crossed():
    assert plan_relocation(pool_of("..H.."), 8, wanted=MANY) == []
    assert plan_relocation(pool_of("..HkH"), 8, wanted=MANY) == []


def test_a_run_at_the_edge_grows_by_what_shorter_ones_lose():
    pool = pool_of("H...kkH..H")
    carry_out(pool, 8)
    assert picture_of(pool) == "H.....HkkH"


def test_what_is_adjacent_stays_adjacent():
    pool = pool_of("H....kkk....H.H..H...H.H")
    plan = carry_out(pool, 8)
    assert [r.destination for r in plan] == [18, 19, 20]
    assert picture_of(pool) == "H...........H.H..HkkkH.H"


def test_a_spare_block_is_not_written():
    pool = pool_of("Hss.k..HsH")
    carry_out(pool, 8)
    assert picture_of(pool) == "Hss...kHsH"
    for block_id in (1, 2, 8):
        assert pool.prefix_cache.find(name_of(block_id)) == block_id


def test_a_spare_block_gives_its_place_where_that_is_allowed():
    pool = pool_of("Hss.k..HsH")
    carry_out(pool, 8, may_evict=True)
    assert picture_of(pool) == "Hss....HkH"
    assert pool.prefix_cache.find(name_of(8)) is None
    assert pool.prefix_cache.find(name_of(1)) == 1


def test_nothing_to_do():
    for picture in ("....", "HHHH", "kkkk", "H..kk", "k", "."):
        pool = pool_of(picture)
        assert plan_relocation(pool, 8, wanted=MANY) == []
    assert plan_relocation(pool_of("H..k...H.H"), 0, wanted=MANY) == []


@settings(max_examples=300)
@given(
    picture=st.text(FREE + KEPT + SPARE + HELD, min_size=1, max_size=60),
    moves=st.integers(0, 9),
    may_evict=st.booleans(),
)
def test_every_plan_makes_the_longest_run_longer_until_none_can(picture, moves, may_evict):
    pool = pool_of(picture)
    held = [b for b in range(len(picture)) if picture[b] == HELD]
    kept = {name_of(b) for b in range(len(picture)) if picture[b] == KEPT}
    for _ in range(len(picture) + 1):
        longest, writable = pool.allocator.largest_free, pool.allocator.num_free
        now = picture_of(pool)
        plan = carry_out(pool, moves, may_evict=may_evict)
        assert len(plan) <= moves
        room = FREE + SPARE if may_evict else FREE
        assert all(now[r.source] == KEPT and now[r.destination] in room for r in plan)
        assert pool.allocator.num_free == writable
        assert [b for b in range(len(picture)) if picture_of(pool)[b] == HELD] == held
        for block_hash in kept:
            block_id = pool.prefix_cache.find(block_hash)
            assert pool.digest(block_id) == 1000 + int(block_hash.split()[1])
        if not plan:
            return
        assert pool.allocator.largest_free > longest
    raise AssertionError("it does not come to an end")


@settings(max_examples=200)
@given(
    picture=st.text(FREE + KEPT + HELD, min_size=1, max_size=24),
    moves=st.integers(1, 24),
    wanted=st.integers(1, 30),
    is_spare=st.booleans(),
)
def test_no_stretch_without_held_blocks_could_have_been_longer(picture, moves, wanted, is_spare):
    """Against trying every stretch: its cached blocks must be few enough and have a place.

    Spare blocks are room like others where they may be.
    """
    pool = pool_of(picture.replace(FREE, SPARE) if is_spare else picture)
    carry_out(pool, moves, wanted, may_evict=is_spare)
    total = picture.count(FREE)
    for start in range(len(picture)):
        for end in range(start + 1, len(picture) + 1):
            part = picture[start:end]
            room = total - part.count(FREE)
            if HELD in part or part.count(KEPT) > min(moves, room) or FREE not in part:
                continue
            reached = min(len(part), wanted)
            assert pool.allocator.largest_free >= reached, (part, picture_of(pool))


# --- the pool meanwhile


def test_a_hit_meanwhile_keeps_its_block():
    pool = pool_of("H..k...H.H")
    plan = plan_relocation(pool, 8, wanted=MANY)
    pool.begin_relocation(plan)
    pool.hold([BlockId(3)])
    assert pool.end_relocation(plan) == 0
    assert picture_of(pool) == "H..H...H.H"
    assert pool.prefix_cache.find(name_of(3)) == 3
    pool.release([BlockId(3)])
    assert picture_of(pool) == "H..k...H.H"


def test_a_source_that_was_taken_up_and_let_go_again_is_read_in_peace():
    pool = pool_of("H..k...H.H")
    plan = plan_relocation(pool, 8, wanted=MANY)
    pool.begin_relocation(plan)
    pool.hold([BlockId(3)])
    pool.release([BlockId(3)])
    taken = pool.allocate(pool.num_available)
    assert 3 not in taken
    assert 8 not in taken
    pool.check()
    assert pool.end_relocation(plan) == 1
    assert picture_of(pool) == "HHH.HHHHkH"


def test_a_failed_copy_leaves_everything_as_it_was():
    pool = pool_of("H..k...H.H")
    plan = plan_relocation(pool, 8, wanted=MANY)
    (generation,) = pool.generations([BlockId(8)])
    pool.begin_relocation(plan)
    pool.abort_relocation(plan)
    pool.check()
    assert picture_of(pool) == "H..k...H.H"
    # Something may have been written there: who read it before must be able to tell.
    assert pool.generations([BlockId(8)]) == (generation + 1,)


def test_a_moved_block_keeps_its_place_in_the_order_of_eviction():
    pool = pool_of("H..k...HkkH.H")  # 9 was let go first, then 8, then 3
    carry_out(pool, 8)
    pool.release([BlockId(0)])
    assert pool.prefix_cache.give_up(3) == [9, 8, 11]


def test_blocks_on_the_move_are_not_moved_again():
    pool = pool_of("H..k...H.H.H")
    pool.begin_relocation(plan_relocation(pool, 8, wanted=MANY))
    assert plan_relocation(pool, 8, wanted=MANY) == []


class RelocatingMachine(PoolMachine):
    """The pool's life, with copies under way that end, or fail, at any later moment.

    What is in a source when the copy begins must be there until it ends.
    """

    def __init__(self):
        super().__init__()
        self.under_way = []  # of (relocations, hashes of the sources)

    @property
    def arriving(self):
        return {r.destination for plan, _ in self.under_way for r in plan}

    @rule(moves=st.integers(1, 4), wanted=st.integers(1, NUM_BLOCKS))
    def begin(self, moves, wanted):
        self.start(plan_relocation(self.pool, moves, wanted=wanted))

    @rule(data=st.data())
    def begin_anything(self, data):
        blocks = [BlockId(b) for b in range(NUM_BLOCKS)]
        sources = [b for b in blocks if self.pool.can_relocate(b)]
        writable = [b for start, n in self.pool.allocator.segments() for b in blocks[start:][:n]]
        if sources and writable:
            source, destination = (data.draw(st.sampled_from(some)) for some in (sources, writable))
            self.start([Relocation(source, destination)])

    def start(self, plan):
        for source, destination in plan:
            assert not self.holders(source)
            assert not self.holders(destination)
            self.contents.pop(destination, None)
            self.handed_out[destination] += 1
        self.pool.begin_relocation(plan)
        self.under_way.append((plan, [self.contents[r.source] for r in plan]))

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), is_done=st.booleans())
    def end(self, data, is_done):
        index = data.draw(st.integers(0, len(self.under_way) - 1))
        plan, hashes = self.under_way.pop(index)
        for (source, destination), block_hash in zip(plan, hashes, strict=True):
            assert self.contents[source] == block_hash, "overwritten while it was read"
            if is_done and not self.holders(source):
                self.contents[destination] = self.contents.pop(source)
        if is_done:
            self.pool.end_relocation(plan)
        else:
            self.pool.abort_relocation(plan)

    @invariant()
    def balances(self):
        self.pool.check()
        active = {b for table in self.tables for b in table}
        cached = set(self.contents) - active
        assert self.pool.num_active == len(active | self.arriving)
        assert self.pool.num_cached == len(cached)
        for block_id in range(NUM_BLOCKS):
            assert self.pool.num_holders(block_id) == self.holders(block_id)
            assert self.pool.generations([block_id]) == (self.handed_out[block_id],)
            self.follow(block_id)
        for block_id, block_hash in self.contents.items():
            assert self.pool.prefix_cache.find(block_hash) == block_id

    def teardown(self):
        for plan, _ in self.under_way:
            self.pool.abort_relocation(plan)
        super().teardown()


RelocatingMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestRelocation = RelocatingMachine.TestCase
