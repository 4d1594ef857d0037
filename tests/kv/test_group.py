from penstock.core.events import Span
from penstock.core.messages import GroupBlocks
from penstock.kv.cache import KVCache
from penstock.transfer.plan import align
from tests.kv.cache_model import BLOCK_SIZE, LAYOUT, hashes_of, num_runs, prefilled, snapshot


def test_a_sliding_group_offers_only_its_window():
    kv, _ = prefilled(30)

    offered = kv.offer("a", 30)

    assert [o.first for o in offered] == [0, 25 // BLOCK_SIZE, 20 // BLOCK_SIZE]
    assert [o.first + len(o.block_ids) for o in offered] == [8, 8, 8]


def test_an_adopted_request_lies_in_runs_like_the_peers():
    source, token_ids = prefilled(40)
    destination = KVCache(LAYOUT, (64, 32, 32))

    adoption = destination.adopt("a", hashes_of(token_ids), 39, source.runs("a", 39))

    assert adoption.cached_tokens == 0
    assert num_runs(destination, "a") == (1, 1, 1)


def test_a_second_request_with_the_same_prefix_pulls_only_the_rest():
    source, token_ids = prefilled(40)
    destination = KVCache(LAYOUT, (64, 32, 32))
    destination.adopt("a", hashes_of(token_ids), 39, source.runs("a", 39))
    destination.advance("a", 39, hashes_of(token_ids))

    adoption = destination.adopt("b", hashes_of(token_ids), 39, source.runs("a", 39))

    assert adoption.cached_tokens == 36
    assert [len(pull.source_ids) for pull in adoption.pulls(source.offer("a", 39))] == [1, 1, 1]


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
    destination.adopt("a", hashes_of(token_ids), 39, source.runs("a", 39))
    destination.advance("a", 39, hashes_of(token_ids))
    destination.close("a")
    lose(destination, 0, named=hashes_of(token_ids)[2])

    adoption = destination.adopt("b", hashes_of(token_ids), 39, source.runs("a", 39))

    assert adoption.cached_tokens == 8
    assert len(adoption.pulls(source.offer("a", 39))[0].source_ids) == 2
    destination.check()


def test_blocks_that_are_hit_are_no_room_for_the_rest():
    source, token_ids = prefilled(40)
    destination = KVCache(LAYOUT, (10, 32, 32))
    destination.adopt("a", hashes_of(token_ids), 39, source.runs("a", 39))
    destination.advance("a", 39, hashes_of(token_ids))
    destination.close("a")
    destination.open("b", [], 0)
    assert destination.grow("b", 4)
    # 9 of 10 blocks are cached, all of them hits, and the request needs one more.
    before = snapshot(destination, ["b"])

    assert destination.adopt("c", hashes_of(token_ids), 39, source.runs("a", 39)) is None

    assert snapshot(destination, ["b"]) == before


def test_what_is_offered_in_parts_is_what_is_offered_at_once():
    source, token_ids = prefilled(40)
    destination = KVCache(LAYOUT, (64, 32, 32))
    adoption = destination.adopt("a", hashes_of(token_ids), 39, source.runs("a", 39))
    whole = adoption.pulls(source.offer("a", 39))

    first = adoption.pulls(source.offer("a", 17, is_last=False))
    rest = adoption.pulls(source.offer("a", 39, after=17))

    assert [len(pull.source_ids) for pull in first] == [17 // BLOCK_SIZE, 0, 0]
    for one, two, both in zip(first, rest, whole, strict=True):
        assert one.source_ids + two.source_ids == both.source_ids
        assert one.destination_ids + two.destination_ids == both.destination_ids
        assert one.generations + two.generations == both.generations


def test_of_blocks_of_another_shape_only_a_prefix_is_held_and_the_rest_reserved():
    source, token_ids = prefilled(40)
    destination = KVCache(LAYOUT, (64, 32, 32))
    destination.adopt("a", hashes_of(token_ids), 39, source.runs("a", 39))
    destination.advance("a", 39, hashes_of(token_ids))
    destination.close("a")
    lose(destination, 0, named=hashes_of(token_ids)[5])

    adoption = destination.adopt("b", hashes_of(token_ids), 39, None)

    missing = [list(group.destination_of) for group in adoption.groups]
    assert missing == [[5, 6, 7, 8, 9], [9], [9]]
    assert adoption.cached_tokens == 5 * BLOCK_SIZE


def found(kv, group, token_ids, entry):
    return kv.groups[group].pool.prefix_cache.find(hashes_of(token_ids)[entry])


def test_a_block_that_lacks_what_nobody_looks_at_any_more_gets_no_name():
    """A peer with other blocks begins its window where it likes, at most where we look."""
    _, token_ids = prefilled(40)
    kv = KVCache(LAYOUT, (64, 32, 32))
    # Token 38 looks back to 33 and 28; entry 8 begins with token 32, entry 7 with 28.
    kv.adopt("a", hashes_of(token_ids), 38, None)
    kv.advance("a", 38, hashes_of(token_ids))

    assert [found(kv, g, token_ids, e) is not None for g, e in ((0, 0), (1, 8), (2, 7))] == [
        True,
        False,
        True,
    ]


def test_a_peers_runs_are_reproduced():
    # The peer has the request in runs of 1, 4 and 5; here only segments of 4, 1 and 5 are free.
    source, token_ids = prefilled(40)
    runs = [50, 30, 31, 32, 33, 10, 11, 12, 13, 14]
    offered = (GroupBlocks(0, tuple(runs)), *source.offer("a", 39)[1:])
    destination = KVCache(LAYOUT, (12, 32, 32))
    destination.groups[0].pool.allocate(12)
    destination.groups[0].pool.release([0, 1, 2, 3, 5, 7, 8, 9, 10, 11])

    lengths = ((1, 4, 5), *source.runs("a", 39)[1:])
    adoption = destination.adopt("a", hashes_of(token_ids), 39, lengths)

    pull = adoption.pulls(offered)[0]
    spans = align(pull.source_ids, pull.destination_ids)
    assert spans == [Span(50, 5, 1), Span(30, 0, 4), Span(10, 7, 5)]


def test_a_prefix_is_given_up_from_its_end():
    kv, token_ids = prefilled(40)
    kv.close("a")
    pool = kv.groups[0].pool
    pool.prefix_cache.forget(pool.prefix_cache.give_up(4))

    assert pool.prefix_cache.longest_prefix(hashes_of(token_ids), 10) == 6
