"""What is asked for of a peer whose blocks have another size."""

from penstock.core.events import Reshape
from penstock.core.messages import GroupBlocks
from penstock.kv.group import Adopted
from penstock.sim.executor import chain_layout
from penstock.worker.reshaping import NOTHING, Reshaping

SMALL, LARGE = chain_layout(16), chain_layout(32)


def reshaping(theirs, ours, num_tokens, *destinations):
    return Reshaping(theirs, ours, num_tokens, [Adopted(d) for d in destinations])


def offered(first, *block_ids, digests=True):
    numbers = tuple(100 + i for i in block_ids) if digests else ()
    return (GroupBlocks(first, block_ids, numbers, block_ids),)


def test_all_at_once():
    way = reshaping(SMALL, LARGE, 70, {0: 7, 1: 8, 2: 9})

    (wanted,) = way.ask([offered(0, 1, 2, 3, 4, 5)])

    assert wanted == Reshape(*offered(0, 1, 2, 3, 4, 5), GroupBlocks(0, (7, 8, 9)), 0, 70)
    assert way.is_whole


def test_our_block_waits_for_the_part_that_fills_it():
    way = reshaping(SMALL, LARGE, 70, {0: 7, 1: 8, 2: 9})

    (first,) = way.ask([offered(0, 1, 2, 3)])
    assert (first.begin, first.end, first.destination.block_ids) == (0, 32, (7,))
    assert not way.is_whole
    (second,) = way.ask([offered(3, 4), offered(4, 5)])

    assert (second.begin, second.end) == (32, 70)
    assert second.source == offered(2, 3, 4, 5)[0]
    assert second.destination == GroupBlocks(1, (8, 9))
    assert way.is_whole


def test_parts_smaller_than_our_block_are_gathered():
    way = reshaping(chain_layout(16), chain_layout(128), 260, {0: 1, 1: 2, 2: 3})

    asked = [way.ask([offered(entry, entry)])[0] for entry in range(17)]

    ranges = [(wanted.begin, wanted.end) for wanted in asked if wanted.end]
    assert ranges == [(0, 128), (128, 256), (256, 260)]
    assert way.is_whole


def test_what_is_here_already_is_not_asked_for():
    way = reshaping(LARGE, SMALL, 70, {3: 7, 4: 8})

    assert way.ask([offered(0, 1)]) == (NOTHING,)
    (wanted,) = way.ask([offered(1, 2, 3)])

    assert (wanted.begin, wanted.end) == (48, 70)
    assert wanted.source == offered(1, 2, 3)[0]
    assert wanted.destination == GroupBlocks(3, (7, 8))
    assert way.is_whole
    assert reshaping(LARGE, SMALL, 70, {}).is_whole


def test_of_a_window_the_peer_may_have_less_than_our_first_block():
    theirs, ours = (chain_layout(size, (0, 20)) for size in (16, 64))
    # Token 150 looks back to token 131, in entry 8 of the peer and entry 2 of ours.
    way = reshaping(theirs, ours, 150, {0: 1, 1: 2, 2: 3}, {2: 9})

    parts = [[GroupBlocks(0, tuple(range(9))), GroupBlocks(0, ())]]
    parts.append([GroupBlocks(9, (9,)), GroupBlocks(8, (4, 5))])
    full, window = way.ask(parts)

    assert (full.begin, full.end) == (0, 150)
    assert (window.begin, window.end, window.destination) == (128, 150, GroupBlocks(2, (9,)))
    assert way.is_whole


def test_too_little_is_not_whole():
    for parts in ([offered(0, 1, 2)], [offered(1, 1, 2, 3, 4)], [offered(0, 1), offered(2, 2, 3)]):
        way = reshaping(SMALL, LARGE, 70, {0: 7, 1: 8, 2: 9})
        way.ask(parts)
        way.ask([offered(4, 5)])
        assert not way.is_whole, parts


def test_digests_are_dropped_where_a_part_has_none():
    way = reshaping(SMALL, LARGE, 70, {0: 7, 1: 8, 2: 9})
    (wanted,) = way.ask([offered(0, 1, 2), offered(2, 3, 4, 5, digests=False)])
    assert wanted.source.digests == ()
    assert wanted.source.generations == (1, 2, 3, 4, 5)
