"""`Sequence`: a worker's own mutable record of one request, and the states it may be in.

state      holds blocks   means
WAITING    no             wants its KV computed; the first in line runs when there is room
RUNNING    yes            takes part in steps until its computed tokens catch up with its tokens
OFFERED    yes            prefill is done, the blocks are another worker's to pull
PULLING    yes            blocks are reserved and being filled from a peer
CLOSING    yes            nobody wants it any more, but a step or a copy still touches its blocks
GONE       no             forgotten

Whoever moves a sequence calls `move_to`, which knows the table.
"""

from enum import Enum
from typing import Final

from penstock.core.block import extend_hashes
from penstock.core.request import Request, Timeline
from penstock.core.types import BlockHash, FinishReason, RequestId, WorkerId


class SequenceState(Enum):
    """See the module's table."""

    WAITING = "waiting"
    RUNNING = "running"
    OFFERED = "offered"
    PULLING = "pulling"
    CLOSING = "closing"
    GONE = "gone"


_S = SequenceState
SEQUENCE_TRANSITIONS: Final[dict[SequenceState, frozenset[SequenceState]]] = {
    # A prompt whose KV is all cached is offered without running.
    _S.WAITING: frozenset({_S.RUNNING, _S.OFFERED, _S.GONE}),
    _S.RUNNING: frozenset({_S.WAITING, _S.OFFERED, _S.CLOSING, _S.GONE}),
    _S.OFFERED: frozenset({_S.CLOSING, _S.GONE}),
    _S.PULLING: frozenset({_S.RUNNING, _S.CLOSING, _S.GONE}),
    _S.CLOSING: frozenset({_S.GONE}),
    _S.GONE: frozenset(),
}


class Sequence:
    """One request on this worker.

    `tokens` is prompt and output; the KV of the first `num_computed` is in the blocks, which have
    slots for `capacity_tokens`. `hashes[i]` names block i once its tokens are known.
    `decode_worker` is set while the request is to be handed off; `prefill_worker` names the peer
    whose blocks we are pulling.
    """

    __slots__ = (
        "arrival",
        "capacity_tokens",
        "decode_worker",
        "hashes",
        "is_first_token_out",
        "is_preempted",
        "num_computed",
        "num_prompt",
        "prefill_worker",
        "request",
        "state",
        "timeline",
        "tokens",
    )

    def __init__(
        self,
        request: Request,
        *,
        arrival: int,
        timeline: Timeline,
        decode_worker: WorkerId | None = None,
        prefill_worker: WorkerId | None = None,
    ) -> None:
        self.request = request
        self.arrival = arrival
        self.timeline = timeline
        self.decode_worker = decode_worker
        self.prefill_worker = prefill_worker
        self.tokens = [*request.prompt_token_ids, *request.output_token_ids]
        self.num_prompt = len(request.prompt_token_ids)
        self.num_computed = 0
        self.capacity_tokens = 0
        self.hashes: list[BlockHash] = []
        self.state = SequenceState.PULLING if prefill_worker else SequenceState.WAITING
        self.is_preempted = False
        self.is_first_token_out = bool(request.output_token_ids)

    @property
    def request_id(self) -> RequestId:
        """The id that workers know the request by."""
        return self.request.request_id

    @property
    def target_tokens(self) -> int:
        """Tokens whose KV this worker is to compute: all, or all but the last when another worker
        goes on.
        """
        return len(self.tokens) - (self.decode_worker is not None)

    @property
    def num_output(self) -> int:
        """Tokens generated so far, by whichever worker."""
        return len(self.tokens) - self.num_prompt

    def move_to(self, state: SequenceState) -> None:
        """Change state along the table."""
        assert state in SEQUENCE_TRANSITIONS[self.state], (self.request_id, self.state, state)
        self.state = state

    def name_blocks(self, block_size: int) -> None:
        """Extend `hashes` over every block that the tokens fill."""
        if len(self.tokens) // block_size > len(self.hashes):
            extend_hashes(self.hashes, self.tokens, block_size, self.request.cache_salt)

    def finish_reason(
        self, eos_token_ids: tuple[int, ...], max_model_len: int
    ) -> FinishReason | None:
        """Say whether the token just appended was the last one."""
        params, last = self.request.params, self.tokens[-1]
        if self.num_output >= params.min_tokens:
            if last in params.stop_token_ids:
                return FinishReason.STOP
            if last in eos_token_ids and not params.ignore_eos:
                return FinishReason.STOP
        if self.num_output >= params.max_tokens or len(self.tokens) >= max_model_len:
            return FinishReason.LENGTH
        return None
