"""What a client, or the controller, hears of a sequence: told apart from who runs it and where."""

from copy import copy

from penstock.core.config import WorkerConfig
from penstock.core.events import Command, Send
from penstock.core.messages import RequestFailed, TokenOutput, Tokens
from penstock.core.step import Sampled
from penstock.core.types import CONTROLLER, WorkerId
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
        sequence.timeline.first_token_ns = now_ns
        sequence.timeline.decode_worker = worker_id
        timeline = copy(sequence.timeline)  # which may go on elsewhere and be stamped again
    return TokenOutput(
        sequence.request_id,
        (*ahead, sampled.token_id),
        (sampled.logprobs,) if sampled.logprobs else (),
        reason,
        timeline,
    )


def tell_tokens(outputs: list[TokenOutput], worker_id: WorkerId) -> list[Command]:
    """Tell the controller what came of a step, if anything did."""
    if not outputs:
        return []
    return [Send(CONTROLLER, Tokens(worker_id=worker_id, outputs=tuple(outputs)))]


def not_handed_off(sequence: Sequence, reason: str, config: WorkerConfig) -> Command:
    """Say that a request cannot be offered from here: another worker may do it."""
    failed = RequestFailed(
        request_id=sequence.request_id,
        reason=f"{reason} before the hand-off",
        is_retryable=True,
        worker_id=config.worker_id,
    )
    return Send(CONTROLLER, failed)
