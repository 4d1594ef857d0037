"""Every message that one node says to another; what crosses the wire is exactly this.

Frozen, tagged structs, encoded as msgpack: nothing on any wire can execute code.

who                     says                                              to
front                   Submit, Cancel                                    controller
controller              Assign, Cancel, Migrate, PeerUp, PeerDown, TellNames,   worker
                        Stop, Ping, Survey, TryLinks
controller              Tokens, RequestFailed, Resize                     front
worker                  Hello, Load, BlocksChanged, Tokens, Offered,          controller
                        Expired, RequestFailed, Ping, Surveyed,
                        LinksTried
prefill worker          Offer, Progress, Withdraw                         decode worker
decode worker           Renew, Release, Grant                             prefill worker
worker                  ShelfChanged, ShelfUsed                           worker of its host
worker                  AskTime, TellTime                                 worker
another host            Join, Ping, Leave, Gone                           controller
controller              Admitted, Refused, Ping, Evict                    another host
"""

from typing import Final

from msgspec import DecodeError, Struct
from msgspec.msgpack import Decoder, Encoder

from penstock.core.descriptors import WorkerInfo
from penstock.core.links import AskTime, LinksTried, TellTime, TryLinks
from penstock.core.membership import Admitted, Evict, Gone, Join, Leave, Ping, Refused
from penstock.core.request import Request, Timeline
from penstock.core.residency import Survey, Surveyed
from penstock.core.step import PullSample, StepSample, TokenLogprobs
from penstock.core.tiers import PrefetchLoad, ShelfChanged, ShelfUsed, TierLoad
from penstock.core.types import (
    BlockHash,
    BlockId,
    Digest,
    FinishReason,
    RequestId,
    Role,
    WorkerId,
)

# ---------------------------------------------------------------------------------- what they carry


class GroupBlocks(Struct, frozen=True, array_like=True):
    """Blocks of a request in one group: `block_ids[i]` is entry `first + i` of its block table.

    `digests[i]` is over the content of block i as offered, `generations[i]` how often it had been
    handed out then; there are none, or one for each block.
    """

    first: int
    block_ids: tuple[BlockId, ...]
    digests: tuple[Digest, ...] = ()
    generations: tuple[int, ...] = ()


class GrantedBlocks(Struct, frozen=True, array_like=True):
    """Blocks that a peer may write: `block_ids[i]` is for entry `entries[i]` of a block table."""

    entries: tuple[int, ...]
    block_ids: tuple[BlockId, ...]


class TokenOutput(Struct, frozen=True, array_like=True):
    """New tokens of one request. The first carries the timeline, the last the reason."""

    request_id: RequestId
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    timeline: Timeline | None = None


# ----------------------------------------------------------------------------------------- messages


class Tagged(Struct, frozen=True, tag=True, kw_only=True):
    """Parent of everything that one node may say to another: on the wire its name says which."""


class Submit(Tagged, frozen=True):
    """Serve this request; its tokens are to come back as `Tokens`."""

    request: Request


class Cancel(Tagged, frozen=True):
    """Nobody wants this request any more: stop within a step and free everything."""

    request_id: RequestId


class Assign(Tagged, frozen=True):
    """Take this request; when `decode_worker` is another worker, prefill it and offer it there."""

    request: Request
    decode_worker: WorkerId
    timeline: Timeline


class Migrate(Tagged, frozen=True):
    """Hand this request, which you are decoding, to another worker: it goes on there."""

    request_id: RequestId
    decode_worker: WorkerId


class PeerUp(Tagged, frozen=True):
    """This worker may send you offers, or take yours."""

    info: WorkerInfo


class PeerDown(Tagged, frozen=True):
    """This incarnation is gone: expect nothing from it, free what was kept for it."""

    worker_id: WorkerId
    epoch: int


class TellNames(Tagged, frozen=True):
    """Say anew which named blocks you have: whoever asks knows nothing of them. Answered by
    `BlocksChanged`, in as many messages as it takes.
    """


class Stop(Tagged, frozen=True):
    """Leave the cluster now; `reason` says why a worker is refused, "" when all is over."""

    reason: str = ""


class Hello(Tagged, frozen=True):
    """A worker joins. `num_returns` counts how often it has lost its controller since it started:
    each time it has dropped every request.
    """

    info: WorkerInfo
    num_returns: int = 0


class Load(Tagged, frozen=True):
    """How full a worker is. Counts of requests by state, free and cached blocks per group, and
    totals since its start.

    `preemptions` and what follows are totals. `prefix_queries` and `prefix_hits` count prompt
    tokens; `pulls_corrupt` pulls whose content was not what was offered, `pulls_stale` those whose
    blocks had been handed out anew meanwhile, `pulls_recomputed` requests whose KV was computed
    again because it could not be pulled, `leases_expired` offers nobody claimed. `step_samples` and
    `pull_samples` are some of what was done since the last report, the latest of each kind.
    `fragmentation` is, per group, the share of the blocks that may be written which lie outside the
    longest run of them: 0 is one run. `prefetches` only where there are tiers.
    """

    worker_id: WorkerId
    waiting: int
    running: int
    handing_off: int
    free_blocks: tuple[int, ...]
    cached_blocks: tuple[int, ...]
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    steps: int = 0
    pulls_corrupt: int = 0
    pulls_stale: int = 0
    pulls_recomputed: int = 0
    leases_expired: int = 0
    step_samples: tuple[StepSample, ...] = ()
    pull_samples: tuple[PullSample, ...] = ()
    fragmentation: tuple[float, ...] = ()
    tiers: tuple[TierLoad, ...] = ()
    prefetches: PrefetchLoad | None = None


class BlocksChanged(Tagged, frozen=True):
    """Names of blocks that this incarnation of a worker has for prefix hits since it last said so,
    and of those that it has no more.
    """

    worker_id: WorkerId
    epoch: int
    stored: tuple[BlockHash, ...]
    removed: tuple[BlockHash, ...] = ()


class Resize(Tagged, frozen=True):
    """Start one worker of each role in `start`, and let `retire` finish what it has and go;
    `reason` is for people.
    """

    start: tuple[Role, ...] = ()
    retire: WorkerId | None = None
    reason: str = ""


class Tokens(Tagged, frozen=True):
    """What one step produced."""

    worker_id: WorkerId
    outputs: tuple[TokenOutput, ...]


class Offered(Tagged, frozen=True):
    """The request's prefill is done and its blocks are offered to the decode worker."""

    request_id: RequestId
    worker_id: WorkerId


class Expired(Tagged, frozen=True):
    """Nobody claimed the offered blocks within their lease; they are free again."""

    request_id: RequestId
    worker_id: WorkerId


class RequestFailed(Tagged, frozen=True):
    """This request cannot go on here. `is_retryable`: another worker may succeed.

    `retry_after_s` is set when it was given up because the cluster is too busy, not because of
    itself: the client may come again after that time.
    """

    request_id: RequestId
    reason: str
    is_retryable: bool = False
    worker_id: WorkerId = WorkerId("")
    retry_after_s: float | None = None


class Offer(Tagged, frozen=True):
    """The KV of the first `num_tokens` tokens of `request` lies in these blocks of `source`: pull,
    then release.

    `num_tokens` is one less than the request's tokens: the decode worker computes the last one and
    samples. `groups` are the blocks of the first `num_ready` tokens; if that is not all, the rest
    is being computed and follows by `Progress`. `runs` are the lengths of the runs in which all of
    them lie, per group, as far as known. The blocks are kept for `lease_ns` from when this is sent,
    and from every `Renew` on. With `is_push` they are not to be read: they will be written to those
    that the decode worker grants. `gaps` are entries of the block table that have been let go of,
    the first and how many, where the prompt's blocks have been chosen: what is offered in their
    place means nothing.
    """

    request: Request
    source: WorkerId
    epoch: int
    num_tokens: int
    num_ready: int
    groups: tuple[GroupBlocks, ...]
    runs: tuple[tuple[int, ...], ...]
    timeline: Timeline
    lease_ns: int
    is_push: bool = False
    gaps: tuple[tuple[int, int], ...] | None = None


class Progress(Tagged, frozen=True):
    """More of what is offered is there: `groups` are the blocks of tokens `[after, num_ready)`.

    With the last of it comes what the prefill worker has stamped of the request's way.
    """

    request_id: RequestId
    source: WorkerId
    epoch: int
    after: int
    num_ready: int
    groups: tuple[GroupBlocks, ...]
    timeline: Timeline | None = None


UNKNOWN: Final = -1
"""Number of ready tokens of a request that only `Progress` has been heard of."""


class Renew(Tagged, frozen=True):
    """The offers of these requests are still wanted: keep their blocks for another lease.

    `num_ready[i]` is what the decode worker knows to be ready of request i; `Progress` that it has
    missed is said again, and the whole offer if it is `UNKNOWN`.
    """

    request_ids: tuple[RequestId, ...]
    num_ready: tuple[int, ...]
    worker_id: WorkerId


class Withdraw(Tagged, frozen=True):
    """Forget the offer; answered by `Release` once no read is under way."""

    request_id: RequestId
    source: WorkerId


class Grant(Tagged, frozen=True):
    """Write the request's blocks to these of mine, and say by `Progress` what is there; or, with
    `is_revoked`, stop doing so and answer by `Withdraw`.

    `num_ready` is what the decode worker knows to be written: `Progress` it has missed is repeated.
    """

    request_id: RequestId
    worker_id: WorkerId
    epoch: int
    num_ready: int
    groups: tuple[GrantedBlocks, ...]
    is_revoked: bool = False


class Release(Tagged, frozen=True):
    """The offered blocks are not needed any more: pulled, or not wanted.

    `is_spoiled`: what was read of them was wrong every time, so they may be wrong where they lie.
    """

    request_id: RequestId
    worker_id: WorkerId
    is_spoiled: bool = False


Message = (
    Submit
    | Cancel
    | Assign
    | Migrate
    | PeerUp
    | PeerDown
    | TellNames
    | Stop
    | Hello
    | Join
    | Admitted
    | Refused
    | Ping
    | Gone
    | Evict
    | Leave
    | Load
    | BlocksChanged
    | Resize
    | Tokens
    | Offered
    | Expired
    | RequestFailed
    | Offer
    | Progress
    | Grant
    | Renew
    | Withdraw
    | Release
    | Survey
    | Surveyed
    | ShelfChanged
    | ShelfUsed
    | TryLinks
    | LinksTried
    | AskTime
    | TellTime
)

# ------------------------------------------------------------------------------------------ wire

WIRE_ERRORS: Final = (DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding junk may raise: not a message, a name that is no text, nesting without end."""

_encoder = Encoder()
_decoder: Decoder[Message] = Decoder(Message)


def encode_message(message: Message) -> bytes:
    """Return the msgpack form of a message."""
    return _encoder.encode(message)


def decode_message(data: bytes | memoryview) -> Message:
    """Parse and validate what `encode_message` made.

    Raises: one of `WIRE_ERRORS` for anything else.
    """
    return _decoder.decode(data)
