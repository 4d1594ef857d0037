"""Whatever order steps and moves end in, and however they end, no slot and no block is lost."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from penstock.core.messages import Cancel
from penstock.core.tiers import TierConfig
from penstock.core.types import RequestId
from tests.worker.story import P0, assign, request
from tests.worker.test_tiers import Below

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
