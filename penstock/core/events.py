"""What a core handles besides messages, and the commands it gives.

Events that never leave a process (a finished step, a timer) and commands are structs, so that a
decision log can hold them.
"""

from enum import Enum

from msgspec import Struct

from penstock.core.config import ControllerConfig
from penstock.core.messages import GroupBlocks, Message
from penstock.core.step import Sampled, Step
from penstock.core.types import BlockHash, BlockId, Digest, RequestId, Role, WorkerId

# ------------------------------------------------------------------------------------- local events


class Configured(Struct, frozen=True, tag=True):
    """What the controller was made with: the first entry of its log, for whoever replays it."""

    config: ControllerConfig


class WorkerLost(Struct, frozen=True, tag=True, kw_only=True):
    """A worker process ended or fell silent."""

    worker_id: WorkerId
    epoch: int
    reason: str


class WorkerSuspected(Struct, frozen=True, tag=True, kw_only=True):
    """A worker has been silent for a while, or is heard again: prefer others while it is."""

    worker_id: WorkerId
    epoch: int
    is_suspected: bool


class Retire(Struct, frozen=True, tag=True):
    """Give this worker nothing new, and `Stop` it once nothing is left of what it has."""

    worker_id: WorkerId
    epoch: int


class SetRole(Struct, frozen=True, tag=True, kw_only=True):
    """Give a worker another role, from the next assignment on; None leaves the one it has.
    `is_pinned`: from now on nobody but a further `SetRole` changes it.
    """

    worker_id: WorkerId
    role: Role | None
    is_pinned: bool = True


class Drain(Struct, frozen=True, tag=True):
    """Take no new request; finish what is under way."""


class StepDone(Struct, frozen=True, tag=True, kw_only=True):
    """The executor finished a step; `sampled[i]` belongs to `samples[i]`, `digests` to `digests_of`
    (empty when this executor takes none), and `scores[i]`, one for each block, to
    `observations[i]`. `error` is set when it failed as a whole.

    Of a step that was run several times at one go, `sampled` has as many rounds of samples. With
    `goes_on` this is one round, and the next one is under way already (`next_round`).
    """

    step_id: int
    sampled: tuple[Sampled, ...]
    started_ns: int
    finished_ns: int
    digests: tuple[tuple[Digest, ...], ...] = ()
    scores: tuple[tuple[float, ...], ...] = ()
    error: str | None = None
    goes_on: bool = False


class MoveDone(Struct, frozen=True, tag=True, kw_only=True):
    """A move landed, or failed with `error`; then the destination blocks hold nothing of use.

    `is_corrupt`: it landed, but a digest is not that of the offer. `is_stale`: a block had been
    handed out anew at the source before it was read to the end; then there is an error as well.
    `digests[g]` are those of the blocks that a reshape has filled (`reshape.whole_blocks`), or
    of those that came encoded or from a tier, or what encoded slots of a tier are known by;
    `NO_DIGEST` for what was wrong, or did not fit. `codec` is what a peer's blocks came in;
    `codec_ns` of the time went into encoding or decoding.
    """

    move_id: int
    num_bytes: int
    num_spans: int
    transport: str
    started_ns: int
    finished_ns: int
    error: str | None = None
    is_corrupt: bool = False
    is_stale: bool = False
    digests: tuple[tuple[Digest, ...], ...] = ()
    codec: str = "raw"
    codec_ns: int = 0


class Woken(Struct, frozen=True, tag=True):
    """The time asked for by `WakeAt` has come."""

    key: str


# ----------------------------------------------------------------------------------------- commands


class MoveClass(Enum):
    """Why blocks move, most urgent first."""

    HANDOFF = "handoff"
    ONBOARD = "onboard"
    PREFETCH = "prefetch"
    OFFLOAD = "offload"
    RELOCATE = "relocate"
    VERIFY = "verify"

    # Members are single objects; Enum's own hash is a call into Python, and queues go by class.
    __hash__ = object.__hash__


class Span(Struct, frozen=True, array_like=True):
    """`num_blocks` adjacent blocks of one group, copied in one call."""

    source: BlockId
    destination: BlockId
    num_blocks: int


class Reshape(Struct, frozen=True, array_like=True):
    """Tokens `[begin, end)` of a request in one group, out of a peer's blocks into ours, which have
    another shape.

    Entries of `source` count in blocks of the peer's size, those of `destination` in ours; slots
    outside the tokens stay as they are. `source.digests` are checked, `destination` has none.
    """

    source: GroupBlocks
    destination: GroupBlocks
    begin: int
    end: int

    @property
    def is_verified(self) -> bool:
        """True when each block that is read has a digest to be compared with."""
        digests = self.source.digests
        return not self.end or (bool(digests) and all(digests))


class TierEnds(Struct, frozen=True, array_like=True):
    """From which tier to which blocks move; "" is the worker's own pool. What goes into a tier has
    `names`, in the order of the spans.
    """

    source: str
    destination: str
    names: tuple[BlockHash, ...] = ()


class Move(Struct, frozen=True, kw_only=True):
    """Copy blocks of a peer, or of our own, into our pool: `spans[g]` are those of group g.

    `digests[g]` are what the copied blocks of group g must have, in the order of the spans, and
    `generations[g]` how often the source may have handed them out; empty where the offer had none.
    From a peer whose blocks have another shape than ours there are no spans, but `reshapes[g]` for
    every group. A move to a `destination` writes blocks of our own into that peer's; one of class
    VERIFY copies nothing and compares what is there with the digests. Between the pool and tiers
    below it (`tiers`), spans count in slots there; `source` is whose tier it is that is read. With
    a `codec` whole blocks cross in that, where the way there has it; they then have other bytes
    here, and digests of their own (`MoveDone.digests`).
    """

    move_id: int
    kind: MoveClass
    request_id: RequestId
    source: WorkerId
    epoch: int
    spans: tuple[tuple[Span, ...], ...]
    digests: tuple[tuple[Digest, ...], ...] = ()
    generations: tuple[tuple[int, ...], ...] = ()
    reshapes: tuple[Reshape, ...] = ()
    destination: WorkerId | None = None
    tiers: TierEnds | None = None
    codec: str = "raw"


class Send(Struct, frozen=True, tag=True):
    """Say this to that node. Messages between two nodes arrive in order or not at all."""

    to: WorkerId
    message: Message


class RunStep(Struct, frozen=True, tag=True):
    """Run this; answered by one `StepDone`, or one for each round."""

    step: Step


class EndStep(Struct, frozen=True, tag=True):
    """Run no round of this step beyond the one that is under way; one that is over is ignored."""

    step_id: int


class SubmitMove(Struct, frozen=True, tag=True, omit_defaults=True):
    """Carry this out; answered by one `MoveDone`. `deadline_ns` is by when it should have landed,
    0 when somebody waits already.
    """

    move: Move
    deadline_ns: int = 0


class WakeAt(Struct, frozen=True, tag=True):
    """Deliver `Woken(key)` at or soon after `at_ns`."""

    at_ns: int
    key: str


Event = (
    Message
    | Configured
    | WorkerLost
    | WorkerSuspected
    | Retire
    | SetRole
    | Drain
    | StepDone
    | MoveDone
    | Woken
)
Command = Send | RunStep | EndStep | SubmitMove | WakeAt
