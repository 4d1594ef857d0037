"""What a sequence's new token means for its client: told apart from who runs it and where."""

from penstock.core.messages import TokenOutput
from penstock.core.step import Sampled
from penstock.core.types import WorkerId
from penstock.worker.sequence import Sequence


def take_token(
    sequence: Sequence, ahead: tuple[int, ...], sampled: Sampled, worker_id: WorkerId, now_ns: int
) -> TokenOutput:
    """Give a sequence its new token, and return it as its client is to hear of it.

    It has those `ahead` already. With the first token goes the timeline, with the last the reason.
    """
    reason = sequence.append(sampled.token_id)
    timeline = None
    if not sequence.is_first_token_out:
        sequence.is_first_token_out = True
        timeline = sequence.timeline
        timeline.first_token_ns = now_ns
        timeline.decode_worker = worker_id
    return TokenOutput(
        sequence.request_id,
        (*ahead, sampled.token_id),
        (sampled.logprobs,) if sampled.logprobs else (),
        reason,
        timeline,
    )
