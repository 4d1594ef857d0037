"""A worker that is asked where its blocks are, in the middle of what it does."""

from penstock.core.residency import DEVICE, PlacedBlock, Survey, Surveyed
from penstock.core.types import NS_PER_S, RequestId
from penstock.worker import surveyor
from tests.worker.story import D0, P0, Story, assign, offer_of, request
from tests.worker.test_tiers import DISK, DRAM, Below, crowd_out


def ask(story: Story, limit: int = 100, **filters: object) -> Surveyed:
    story.tell(Survey(number=7, limit=limit, **filters))
    (answer,) = story.heard(Surveyed)
    assert isinstance(answer, Surveyed)
    assert answer.number == 7
    return answer


def states(answer: Surveyed) -> list[str]:
    return [block.state for block in answer.blocks]


def test_held_blocks_are_hot_and_without_a_tier_cached_ones_are_dropped_like_cold_ones():
    story = Story(D0)
    story.tell(assign(request("a", 40, max_tokens=2), D0))
    held = ask(story)
    assert states(held) == ["active"] * 3
    assert {(b.temperature, b.num_holders, b.idle_ns) for b in held.blocks} == {("hot", 1, None)}
    while story.steps:
        story.step()
    answer = ask(story)
    (pool,) = answer.pools
    assert (pool.num_blocks, pool.num_active, pool.num_cached, pool.num_free) == (16, 0, 2, 14)
    assert pool.longest_run == 14
    assert states(answer) == ["cached", "cached"]
    assert all(block.name is not None for block in answer.blocks)
    story.now_ns = 5 * NS_PER_S
    blocks = ask(story).blocks
    assert [block.temperature for block in blocks] == ["cold"] * 2
    assert all(b.idle_ns is not None and b.idle_ns > 4 * NS_PER_S for b in blocks)


def test_what_is_likely_to_be_used_again_is_hot_and_what_never_was_gets_cold():
    below = Below(DRAM, DISK, num_blocks=12)
    below.story.worker.tiers.note_step(16, 100)
    below.run("a", 100)
    assert {block.temperature for block in ask(below.story).blocks} == {"hot"}, "nothing is known"
    for number in range(40):
        below.run(f"other{number}", 1000 * (number + 1), 60)
    blocks = ask(below.story).blocks
    assert {block.temperature for block in blocks if block.state != "active"} == {"cold"}


def test_totals_alone_name_no_block():
    story = Story(D0)
    story.tell(assign(request("a", 40), D0))
    answer = ask(story, limit=0)
    assert answer.blocks == ()
    assert answer.next is None
    assert answer.pools[0].num_active == 3


def test_pages_go_on_where_the_last_one_ended_and_leave_nothing_out():
    story = Story(D0)
    story.tell(assign(request("a", 100), D0))
    whole, found = ask(story), []
    start = (0, 0)
    for _ in range(10):
        page = ask(story, limit=3, start=start)
        assert len(page.blocks) <= 3
        found += page.blocks
        if page.next is None:
            break
        start = page.next
    assert tuple(found) == whole.blocks
    assert len(found) == 7


def test_an_answer_looks_at_no_more_blocks_than_it_may(monkeypatch):
    monkeypatch.setattr(surveyor, "SCAN_MAX", 4)
    story = Story(D0)
    story.tell(assign(request("a", 100), D0))
    page = ask(story, name=b"no such".hex()[:8])
    assert (page.blocks, page.next) == ((), (0, 4))


def test_by_request_and_by_name():
    story = Story(D0)
    story.tell(assign(request("a", 40), D0))
    story.tell(assign(request("b", 20, start=900), D0))
    story.step()
    story.step()
    of_b = ask(story, request_ids=(RequestId("b"),))
    assert len(of_b.blocks) == 2
    assert ask(story, request_ids=(RequestId("nobody"),)).blocks == ()
    name = of_b.blocks[0].name
    assert name is not None
    for digits in (name.hex(), name.hex()[:9]):
        (block,) = ask(story, name=digits).blocks
        assert block == of_b.blocks[0]
    both = ask(story, request_ids=(RequestId("a"), RequestId("b")))
    assert len(both.blocks) == 5


def test_what_is_pulled_or_read_by_a_peer_says_so():
    decode = Story(D0)
    decode.tell(offer_of("r", 40))
    assert {block.in_flight for block in ask(decode).blocks} == {"pulled from a peer"}
    decode.land()
    assert {block.in_flight for block in ask(decode).blocks} == {""}
    prefill = Story(P0)
    prefill.tell(assign(request("r", 40), D0))
    while prefill.steps:
        prefill.step()
    assert {block.in_flight for block in ask(prefill).blocks} == {"read by a peer"}


def test_tiers_say_what_they_have_and_what_is_on_its_way_there_and_back():
    below = Below(DRAM, DISK)
    story = below.story
    story.tell(assign(request("a", 40, start=100, max_tokens=1), P0))
    story.step()
    going_down = ask(story)
    assert [t.num_arriving for t in going_down.tiers] == [2, 0]
    assert {b.in_flight for b in going_down.blocks if b.place == DEVICE} == {"to dram"}
    below.move_all()
    answer = ask(story)
    dram, disk = answer.tiers
    assert (dram.load.num_used, dram.codec, dram.num_arriving) == (2, "raw", 0)
    assert dram.slot_bytes == story.worker.config.layout.block_bytes[0]
    assert (disk.load.num_used, disk.codec) == (0, "raw")
    there = on(answer, "dram")
    assert [block.state for block in there] == ["present"] * 2
    assert {block.name for block in there} == {b.name for b in on(answer, DEVICE)}
    crowd_out(below)
    story.tell(assign(request("again", 40, start=100, max_tokens=1), P0))
    coming_up = ask(story)
    assert coming_up.num_onboards == 1
    assert sum(tier.num_reading for tier in coming_up.tiers) == 2
    assert [b.in_flight for b in on(coming_up, DEVICE)].count("from a tier") == 2
    read = [b for b in coming_up.blocks if b.in_flight == "read"]
    assert {b.name for b in read} == {b.name for b in there}
    start, found = (0, 0), []
    while start is not None:
        page = ask(story, limit=2, start=start)
        found += page.blocks
        start = page.next
    assert list(map(where, found)) == list(map(where, coming_up.blocks))


def where(block: PlacedBlock) -> tuple[str, int, object]:
    return block.place, block.index, block.name


def on(answer: Surveyed, place: str) -> list[PlacedBlock]:
    return [block for block in answer.blocks if block.place == place]
