"""What is heard of a sequence is how it was when that was said."""

from penstock.core.step import Sampled
from penstock.core.types import RequestId, WorkerId
from penstock.worker.output import take_token
from tests.worker.story import D0, P0, Story, assign, request


def test_the_timeline_of_a_first_token_does_not_change_when_its_sequence_goes_elsewhere() -> None:
    story = Story(P0, num_blocks=16)
    story.tell(assign(request(RequestId("r"), 20), P0))
    (sequence,) = story.worker.sequences.values()
    said = take_token(sequence, (), Sampled(1), WorkerId(D0), 5)
    assert said.timeline is not None
    sequence.timeline.offered_ns = 7
    assert (said.timeline.first_token_ns, said.timeline.offered_ns) == (5, 0)
