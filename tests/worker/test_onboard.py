"""Whatever order steps and moves end in, and however they end, no slot and no block is lost; and
out of a slow tier blocks come beside computing.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from penstock.core.messages import Cancel
from penstock.core.tiers import TierConfig
from penstock.core.types import RequestId
from tests.worker.story import P0, assign, request
from tests.worker.test_tiers import BLOCK_BYTES, Below

TIERS = (
    TierConfig(name="dram", num_slots=5, bytes_per_s=10_000_000_000),
    TierConfig(name="disk", num_slots=7, bytes_per_s=1_000_000_000),
)


class TiersUnderAnything(RuleBasedStateMachine):
    """The books are checked after every event, by `Story`."""

    def __init__(self) -> None:
        super().__init__()
        self.below = Below(*TIERS, num_blocks=9)
        self.count = 0

    @rule(start=st.sampled_from([0, 1000, 2000]), length=st.integers(1, 100))
    def ask(self, start: int, length: int) -> None:
        self.count += 1
        story = self.below.story
        story.tell(assign(request(f"r{self.count}", length, start=start, max_tokens=2), P0))

    @precondition(lambda self: self.below.story.steps)
    @rule()
    def step(self) -> None:
        self.below.story.step()

    @precondition(lambda self: self.below.story.moves)
    @rule(how=st.sampled_from(["well", "well", "failed", "wrong"]))
    def land(self, how: str) -> None:
        self.below.land("no" if how == "failed" else None, 0 if how == "wrong" else None)

    @precondition(lambda self: self.count)
    @rule(back=st.integers(0, 3))
    def cancel(self, back: int) -> None:
        self.below.story.tell(Cancel(request_id=RequestId(f"r{max(1, self.count - back)}")))

    @rule(took_ns=st.sampled_from([1, 100, 10_000]))
    def learn(self, took_ns: int) -> None:
        """What computing takes decides how much is brought, and whether beside it."""
        self.below.story.worker.tiers.note_step(16, took_ns)

    @rule()
    def wait(self) -> None:
        self.below.story.now_ns += 11_000_000_000

    def teardown(self) -> None:
        story = self.below.story
        while story.steps or story.moves:
            if story.moves:
                self.below.land()
            else:
                story.step()
        story.assert_empty()
        assert not story.worker.tiers.num_fetches
        self.below.assert_nothing_held()


TestTiersUnderAnything = TiersUnderAnything.TestCase
TestTiersUnderAnything.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)


SLOW = TierConfig(name="disk", num_slots=64, bytes_per_s=BLOCK_BYTES * 1000)
"""A block takes a millisecond."""


def slowly_returning(num_prompt: int = 100) -> Below:
    """A request returns whose blocks are as soon computed as brought."""
    below = Below(SLOW, num_blocks=16)
    below.run("a", 100, num_prompt)
    for number in range(2):
        below.run(f"other{number}", 1000 * (number + 1), 150)
    below.story.worker.tiers.note_step(16, 1_000_000)
    below.story.tell(assign(request("a again", num_prompt, start=100, max_tokens=1), P0))
    return below


def test_out_of_a_tier_as_slow_as_computing_the_end_comes_while_the_front_is_computed() -> None:
    below = slowly_returning()
    story = below.story
    (submit,) = story.moves
    assert [span.num_blocks for span in submit.move.spans[0]] == [3]
    (step,) = story.steps
    assert (step.num_computed.tolist(), step.num_new.tolist()) == ([0], [48])
    below.land()
    story.step()
    (step,) = story.steps
    assert (step.num_computed.tolist(), step.num_new.tolist()) == ([96], [4])
    story.step()
    below.move_all()
    story.assert_empty()
    assert (below.load().num_hits, below.load().exposed_ns) == (3, 0)


def test_what_comes_late_is_computed_and_skipped_as_soon_as_it_is_there() -> None:
    below = slowly_returning(190)
    story = below.story
    story.step()
    (step,) = story.steps
    assert (step.num_computed.tolist(), step.num_new.tolist()) == ([80], [64])
    below.land()
    story.step()
    (step,) = story.steps
    assert (step.num_computed.tolist(), step.num_new.tolist()) == ([176], [14])
    story.step()
    below.move_all()
    story.assert_empty()


def test_what_comes_wrong_beside_computing_is_computed_as_well() -> None:
    below = slowly_returning()
    story = below.story
    below.land(wrong=1)
    story.step()
    (step,) = story.steps
    assert (step.num_computed.tolist(), step.num_new.tolist()) == ([64], [36])
    story.step()
    below.move_all()
    story.assert_empty()
    assert below.load().num_corrupt == 1


def test_who_is_cancelled_while_computing_wants_nothing_any_more() -> None:
    below = slowly_returning()
    story = below.story
    story.tell(Cancel(request_id=RequestId("a again")))
    story.step()
    below.move_all()
    story.assert_empty()


def test_while_others_run_nothing_is_computed_that_can_be_brought() -> None:
    below = Below(SLOW, num_blocks=40)
    below.run("a", 100, 100)
    for number in range(4):
        below.run(f"other{number}", 1000 * (number + 1), 180)
    below.story.worker.tiers.note_step(16, 2_000_000)
    below.story.tell(assign(request("long", 20, start=9000, max_tokens=20), P0))
    below.story.tell(assign(request("a again", 100, start=100, max_tokens=1), P0))
    (submit,) = below.story.moves
    assert [span.num_blocks for span in submit.move.spans[0]] == [6]
