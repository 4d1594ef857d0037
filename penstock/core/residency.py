"""Where KV blocks are, as a worker says it when it is asked: `Survey` and its answer, `Surveyed`.

Part of the messages of `core/messages.py`. Whoever asks is told totals, which cost the worker
nothing, and of blocks a page at a time, so that no answer grows with the pool.
"""

from typing import Final

from msgspec import Struct

from penstock.core.tiers import TierLoad
from penstock.core.types import BlockHash, RequestId, WorkerId

DEVICE: Final = "device"
"""The place of blocks in a worker's own pool; the other places are its tiers."""

ENTRIES_MAX: Final = 1000
"""Of one answer."""

Place = tuple[int, int]
"""Where a walk over all blocks of a worker goes on: in which pool or tier, at which block."""


class Survey(Struct, frozen=True, tag=True, kw_only=True):
    """Say where your blocks are: totals, and of single blocks at most `limit`, from `start` on.

    With `request_ids` only those that these requests hold, and their copies; with `name`, the
    beginning of a block's name in hexadecimal digits, only those that are called so.
    """

    number: int
    limit: int = 0
    start: Place = (0, 0)
    request_ids: tuple[RequestId, ...] = ()
    name: str = ""


class PoolResidency(Struct, frozen=True, array_like=True):
    """One pool of a worker, in blocks: `num_active` are held, `num_cached` only there for hits.

    `longest_run` counts those that may be written and lie in one piece.
    """

    window: int
    num_blocks: int
    num_free: int
    num_active: int
    num_cached: int
    longest_run: int
    block_bytes: int
    codec: str
    num_retained: int = 0


class TierResidency(Struct, frozen=True, array_like=True):
    """One tier below a worker's pool: totals, the codec of its slots, and copies in flight.

    Getting a block back is expected to cost `decode_ns` beside the copy; 0 for raw slots.
    """

    load: TierLoad
    codec: str
    slot_bytes: int
    num_arriving: int
    num_reading: int
    decode_ns: int = 0


class PlacedBlock(Struct, frozen=True, array_like=True):
    """A block in one place: the pool (`DEVICE`) of `group`, or a tier.

    `state` is active, cached or spare in a pool, present or condemned in a tier. `in_flight` says
    which copy is under way: where to, or that a move reads it. `idle_ns` is the time since it was
    let go or last brought back; None while it is held, or when nobody knows. `decode_ns` is what
    its codec is expected to take to give it back.
    """

    place: str
    group: int
    index: int
    state: str
    name: BlockHash | None
    codec: str
    temperature: str
    num_bytes: int
    num_holders: int
    in_flight: str = ""
    idle_ns: int | None = None
    retained_ns: int = 0
    decode_ns: int = 0


class Surveyed(Struct, frozen=True, tag=True, kw_only=True):
    """Answer to the survey of that number. `next` is where to go on; None when that was all."""

    number: int
    worker_id: WorkerId
    epoch: int
    pools: tuple[PoolResidency, ...]
    tiers: tuple[TierResidency, ...]
    num_onboards: int = 0
    blocks: tuple[PlacedBlock, ...] = ()
    next: Place | None = None


# --------------------------------------------------------------------------- asking all workers


class KVQuery(Struct, frozen=True, kw_only=True):
    """What somebody wants to know of the whole cluster: totals, and of single blocks at most
    `limit`, from `start` of worker `first` on (None: from the beginning).

    `worker_id` leaves the others out. `request_ids` are as the front knows them.
    """

    limit: int = 0
    first: WorkerId | None = None
    start: Place = (0, 0)
    worker_id: WorkerId | None = None
    request_ids: tuple[RequestId, ...] = ()
    name: str = ""


class KVSurvey(Struct, frozen=True, kw_only=True):
    """What the workers answered in time, in order of joining, and those that did not.

    `blocks[i]` are of `owners[i]`. `next` is where to go on, of which worker; None at the end.
    """

    answers: tuple[Surveyed, ...]
    silent: tuple[WorkerId, ...] = ()
    owners: tuple[WorkerId, ...] = ()
    blocks: tuple[tuple[PlacedBlock, ...], ...] = ()
    next: tuple[WorkerId, Place] | None = None
