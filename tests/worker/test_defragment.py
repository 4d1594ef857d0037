"""An idle worker moves cached blocks together, and never stands in a request's way."""

from penstock.core.events import MoveClass, WakeAt, Woken
from penstock.core.messages import Load, Tokens
from penstock.core.types import CONTROLLER
from tests.worker.story import P0, Story, assign, request


def scattered(**settings: int) -> Story:
    """A worker that has become idle with cached blocks between its free ones."""
    story = Story(P0, num_blocks=12, max_num_batched_tokens=200, **settings)
    # Side by side; of each the last block is not full, and free afterwards.
    for name, start in (("a", 100), ("b", 300), ("c", 400)):
        story.tell(assign(request(name, 40, start=start, max_tokens=1), P0))
    while story.steps:
        story.step()
    return story


def test_pools_are_looked_at_once_per_interval_and_then_again() -> None:
    story = Story(P0, num_blocks=12, max_num_batched_tokens=200)
    story.tell(assign(request("first", 40, start=500, max_tokens=1), P0))
    story.step()  # idle: looked at, nothing to gain
    for name, start in (("a", 100), ("b", 300)):
        story.tell(assign(request(name, 40, start=start, max_tokens=1), P0))
    while story.steps:
        story.step()
    assert not story.moves
    (wake,) = [c for c in story.asked if isinstance(c, WakeAt) and c.key == "defragment"]
    story.now_ns = wake.at_ns
    story.tell(Woken(wake.key))
    assert story.moves


def longest_free(story: Story) -> int:
    return story.worker.kv.groups[0].pool.allocator.largest_free


def test_an_idle_worker_makes_its_longest_free_run_longer_and_then_stops() -> None:
    story = scattered()
    before = longest_free(story)
    assert story.moves
    while story.moves:
        assert story.moves[0].move.kind is MoveClass.RELOCATE
        assert story.moves[0].move.source == P0
        story.land()
    assert longest_free(story) > before
    assert story.worker.defragmenter.num_moved
    story.assert_empty()
    # What has moved is found where it is now.
    story.tell(assign(request("again", 40, start=100, max_tokens=1), P0))
    assert story.steps[0].num_computed.tolist() == [32]
    story.step()
    assert story.heard(Tokens)
    story.assert_empty()


def test_a_worker_that_is_not_to_leaves_its_blocks_where_they_are() -> None:
    story = scattered(is_defragmenting=False)
    assert not story.moves
    assert story.worker.is_idle


def test_the_last_report_comes_when_every_block_is_back() -> None:
    story = scattered()
    while story.moves:
        story.land()
    load = story.heard(Load)[-1]
    assert load.free_blocks[0] + load.cached_blocks[0] == 12


def test_a_copy_that_fails_leaves_everything_where_it_was() -> None:
    story = scattered()
    before = longest_free(story)
    story.land(error="no")
    assert not story.moves
    assert longest_free(story) >= before
    story.assert_empty()


def test_a_request_that_comes_meanwhile_runs_at_once() -> None:
    story = scattered()
    story.tell(assign(request("new", 40, start=100, max_tokens=1), P0))
    assert story.steps[0].num_computed.tolist() == [32]
    story.land()
    story.step()
    assert [o.request_id for t in story.heard(Tokens) for o in t.outputs][-1] == "new"
    story.assert_empty()
    assert all(send.to == CONTROLLER for send in story.said)
