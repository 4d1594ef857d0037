"""What is below a worker's pool, as a worker is told of it and as it tells of it, to its siblings
(the other workers of its host) too.

Slots of one block each, in tiers by name (`kv/tiers.py` has the names). Who decides is
`worker/tiers.py`, where the bytes are is `transport/tier.py`'s; both speak in these.
"""

from msgspec import Struct

from penstock.core.types import BlockHash, Digest, WorkerId


class KeptBlock(Struct, frozen=True, array_like=True):
    """A block in a tier: where, whose content, and by what it is known to be right."""

    slot: int
    name: BlockHash
    digest: Digest


class TierConfig(Struct, frozen=True, kw_only=True):
    """Slots below a worker's pool, one block each. `name` is a value of `kv.tiers.Tier`, `label`
    what to call it before people, if that is more.

    Rate and latency are what to expect until they have been measured; `kept` is what is there.
    Slots hold blocks by way of `codec`, in `slot_bytes` each (0: a block's), of which `decode_ns`
    is what getting one back costs. A lossy codec's slots are for those that accept a loss.
    """

    name: str
    num_slots: int
    bytes_per_s: int
    latency_ns: int = 0
    kept: tuple[KeptBlock, ...] = ()
    label: str = ""
    eviction: str = "lru"
    """The order in which blocks are given up, one of `kv.eviction.ORDERS`."""
    codec: str = "raw"
    is_lossy: bool = False
    slot_bytes: int = 0
    decode_ns: int = 0


class TierLoad(Struct, frozen=True, array_like=True):
    """What a tier below a worker's pool holds, in blocks, and totals since the worker's start.

    `num_hits` blocks were brought back in time of need, in `bytes_out`; `bytes_in` went in.
    `num_corrupt` came back wrong and were dropped, `num_failed` could not be written,
    `num_evicted` were given up for others. Requests whose turn it was waited `exposed_ns` for moves
    out of here. `num_wanted` blocks were here when a request came that lacked them, `num_declined`
    were not written here, because what they would save was not worth it. Bytes are those of slots;
    `raw_bytes_in` and `raw_bytes_out` are what they are as blocks, and `encode_ns` and `decode_ns`
    what a codec took to make the one of the other; requests waited `exposed_decode_ns` for that.

    What was brought out of siblings' tiers of that name counts where it was brought to:
    `num_shared` of the hits, and `num_stale` that were not any more what the sibling had named.
    Where they still should have been, the sibling counts them as corrupt.
    """

    name: str
    num_slots: int
    num_used: int
    num_hits: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    num_corrupt: int = 0
    num_failed: int = 0
    num_evicted: int = 0
    exposed_ns: int = 0
    num_shared: int = 0
    num_stale: int = 0
    num_wanted: int = 0
    num_declined: int = 0
    raw_bytes_in: int = 0
    raw_bytes_out: int = 0
    encode_ns: int = 0
    decode_ns: int = 0
    exposed_decode_ns: int = 0


class PrefetchLoad(Struct, frozen=True, array_like=True):
    """What came of blocks that were wished for before they were needed, since the worker's start.

    Used: there in time; late: on their way by then; missed: not begun by then; wasted: brought and
    not used before they were given up; dropped: withdrawn before anything was begun.
    """

    num_used: int = 0
    num_late: int = 0
    num_missed: int = 0
    num_wasted: int = 0
    num_dropped: int = 0


class ShelfChanged(Struct, frozen=True, tag=True, kw_only=True):
    """What this incarnation of a worker has in a tier since it last said so, and what it has no
    more. Its siblings may read it there. `is_all`: what was said before is void.
    """

    worker_id: WorkerId
    epoch: int
    tier: str
    stored: tuple[KeptBlock, ...]
    removed: tuple[BlockHash, ...] = ()
    is_all: bool = False


class ShelfUsed(Struct, frozen=True, tag=True, kw_only=True):
    """What a sibling has read of this incarnation's tier: blocks that were of use, and blocks that
    were not what they had been named.
    """

    epoch: int
    tier: str
    right: tuple[BlockHash, ...] = ()
    wrong: tuple[KeptBlock, ...] = ()
