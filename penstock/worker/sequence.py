"""`Sequence`: a worker's own mutable record of one request, and the states it may be in.

state         holds blocks   means
WAITING       no             wants its KV computed; the first in line runs when there is room
RUNNING       yes            takes part in steps until its computed tokens catch up with its tokens
HANDING_OFF   yes            a peer reads its blocks, or they are being filled from a peer's; its
                             session says how far that is (`transfer/session.py`)
CLOSING       yes            nobody wants it any more, but a step still writes its blocks
GONE          no             forgotten

Whoever moves a sequence calls `move_to`, which knows the table.
"""

from enum import Enum
from typing import Final

from msgspec.structs import replace

from penstock.core.block import extend_hashes
from penstock.core.config import WorkerConfig
from penstock.core.request import Request, Timeline
from penstock.core.step import Observation
from penstock.core.types import BlockHash, FinishReason, RequestId, WorkerId
from penstock.kv.retention import Retention
from penstock.kv.selection import OBSERVED_TOKENS


class SequenceState(Enum):
    """See the module's table."""

    WAITING = "waiting"
    RUNNING = "running"
    HANDING_OFF = "handing_off"
    CLOSING = "closing"
    GONE = "gone"


LATE_TOKENS: Final = 64
"""In a step of a sequence that has reached what is to come out of a tier before it has come."""

_S = SequenceState
SEQUENCE_TRANSITIONS: Final[dict[SequenceState, frozenset[SequenceState]]] = {
    _S.WAITING: frozenset({_S.RUNNING, _S.GONE}),
    _S.RUNNING: frozenset({_S.WAITING, _S.HANDING_OFF, _S.CLOSING, _S.GONE}),
    # Back to the line: what could not be pulled is computed here.
    _S.HANDING_OFF: frozenset({_S.RUNNING, _S.WAITING, _S.CLOSING, _S.GONE}),
    _S.CLOSING: frozenset({_S.GONE}),
    _S.GONE: frozenset(),
}


class Sequence:
    """One request on this worker.

    `tokens` is prompt and output; the KV of the first `num_computed` is in the blocks, which have
    slots for `capacity_tokens`. `hashes[i]` names block i once its tokens are known.
    `is_pinned` while a peer may read its blocks although it still runs.
    `decode_worker` is set while the request is to be handed off, and then `num_left_over`, the
    number of last tokens whose KV is not ours to compute, is 1; `prefill_worker` names the peer
    whose blocks we are pulling. `coming_from` is set while blocks from that token on are brought
    out of a tier and those before it are computed. The request ends with `tokens_max` tokens or
    with one of `stop_ids`. Where a part of the prompt's KV is to be kept (`kv_select`), it is
    chosen after `select_end` tokens, all of the prompt but the last, by whoever computes them if it
    `selects_here`, or else by who goes on (whose blocks have another shape, and could not be told
    which of ours were kept); with `is_selected` that has been done. `select_end` is 0 where all is
    kept.
    """

    __slots__ = (
        "arrival",
        "capacity_tokens",
        "coming_from",
        "decode_worker",
        "hashes",
        "is_first_token_out",
        "is_pinned",
        "is_preempted",
        "is_selected",
        "num_computed",
        "num_left_over",
        "num_prompt",
        "prefill_worker",
        "request",
        "select_end",
        "selects_here",
        "state",
        "stop_ids",
        "timeline",
        "tokens",
        "tokens_max",
    )

    def __init__(
        self,
        request: Request,
        config: WorkerConfig,
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
        self.num_left_over = int(decode_worker is not None)
        params = request.params
        self.tokens_max = min(self.num_prompt + params.max_tokens, config.max_model_len)
        eos_token_ids = () if params.ignore_eos else config.eos_token_ids
        self.stop_ids = frozenset((*params.stop_token_ids, *eos_token_ids))
        self.num_computed = 0
        self.capacity_tokens = 0
        self.coming_from: int | None = None
        self.hashes: list[BlockHash] = []
        self.state = SequenceState.HANDING_OFF if prefill_worker else SequenceState.WAITING
        self.is_preempted = False
        self.is_pinned = False
        self.is_first_token_out = bool(request.output_token_ids)
        is_long = 0 < request.kv_select < self.num_prompt - 1
        self.select_end = self.num_prompt - 1 if is_long else 0
        self.selects_here = True
        self.is_selected = False

    @property
    def request_id(self) -> RequestId:
        """The id that workers know the request by."""
        return self.request.request_id

    @property
    def target_tokens(self) -> int:
        """Tokens whose KV this worker is to compute: all, or all but the last when another worker
        goes on.
        """
        return len(self.tokens) - self.num_left_over

    @property
    def chunk_tokens(self) -> int:
        """Tokens to compute next, at most: up to what is coming, and while that is late a few at a
        time, so that it is of use as soon as it is there; blocks are chosen between two steps.
        """
        missing = self.target_tokens - self.num_computed
        if self.is_to_select and self.num_computed < self.select_end:
            missing = min(missing, self.select_end - self.num_computed)
        if self.coming_from is None:
            return missing
        ahead = self.coming_from - self.num_computed
        return min(missing, ahead if ahead > 0 else LATE_TOKENS)

    @property
    def is_decoding(self) -> bool:
        """True when the KV of all tokens but the last is here, and it is to go on here."""
        is_running = self.state is SequenceState.RUNNING and self.decode_worker is None
        return is_running and self.num_computed == len(self.tokens) - 1 > 0

    @property
    def can_go(self) -> bool:
        """True when it can be handed to another worker: all its KV is here, and it decodes."""
        return self.is_decoding and not self.request.kv_window and not self.select_end

    @property
    def window(self) -> int:
        """The last tokens that are still looked at, 0 for all: as long as the prompt is read, it
        goes on elsewhere, or a peer reads its blocks, it is all.
        """
        if not self.request.kv_window or self.decode_worker is not None or self.is_pinned:
            return 0
        return self.request.kv_window if self.num_computed >= self.target_tokens else 0

    @property
    def is_to_select(self) -> bool:
        """True when its blocks are still to be chosen from, here."""
        return bool(self.select_end) and self.selects_here and not self.is_selected

    def observation(self, row: int, end: int) -> Observation | None:
        """Return what a step must observe that computes this sequence, its row, up to token `end`;
        None where there is nothing to choose from then.
        """
        if not self.is_to_select or end < self.select_end:
            return None
        first = self.select_end - OBSERVED_TOKENS
        return Observation(row, first, tuple(self.tokens[first : self.select_end]))

    def lose_blocks(self) -> None:
        """Note that nothing of it is computed (any more)."""
        self.num_computed = self.capacity_tokens = 0
        self.is_selected = False

    def hand_to(self, decode_worker: WorkerId) -> None:
        """Make what has been decoded so far a request for another worker to continue."""
        output_token_ids = tuple(self.tokens[self.num_prompt :])
        self.request = replace(self.request, output_token_ids=output_token_ids)
        self.decode_worker = decode_worker
        self.num_left_over = 1

    def move_to(self, state: SequenceState) -> None:
        """Change state along the table."""
        assert state in SEQUENCE_TRANSITIONS[self.state], (self.request_id, self.state, state)
        self.state = state

    def name_blocks(self, block_size: int) -> None:
        """Extend `hashes` over every block that the tokens fill. What is computed after blocks were
        chosen from is no function of its tokens alone, and gets no name.
        """
        num_tokens = self.select_end or len(self.tokens)
        if num_tokens // block_size > len(self.hashes):
            extend_hashes(
                self.hashes,
                self.tokens[: self.select_end] if self.select_end else self.tokens,
                block_size,
                self.request.cache_salt,
                accepts_loss=self.request.accepts_loss,
                kv_window=self.request.kv_window,
            )

    def retain(self, retention: Retention) -> None:
        """Have the named blocks of a sequence that ends kept as long as the request asks for."""
        request, until_ns = self.request, retention.now_ns + self.request.retention_ns
        if request.pin and request.retention_ns:
            retention.pin(request.pin_id, self.hashes, until_ns)
        elif request.pin:
            retention.unpin(request.pin_id)
        elif request.retention_ns:
            retention.retain(self.hashes, until_ns)

    def append(self, token_id: int) -> FinishReason | None:
        """Take the next token; say why, if it is the last one."""
        tokens = self.tokens
        tokens.append(token_id)
        num_tokens = len(tokens)
        min_tokens = self.request.params.min_tokens
        if token_id in self.stop_ids and num_tokens - self.num_prompt >= min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if num_tokens >= self.tokens_max else None
