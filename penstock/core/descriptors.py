"""What a worker says of itself when it joins, and of the memory that peers may read.

Carried by messages of `penstock/core/messages.py`; decided by nobody here.
"""

from msgspec import Struct

from penstock.core.block import KVLayout
from penstock.core.config import Handoff
from penstock.core.types import Role, WorkerId


class RegionDescriptor(Struct, frozen=True, array_like=True):
    """A peer's registered memory, as it may be sent: enough to map and read one group's pool, and
    nothing more.

    `location` is for the transport named by `kind` alone to understand. `capacity_bytes` bounds
    every read.
    """

    kind: str
    location: str
    capacity_bytes: int
    block_bytes: int


class TierRegion(Struct, frozen=True, array_like=True):
    """Where siblings find the slots of a worker's tier, how to call it, and in which codec they
    are.
    """

    name: str
    label: str
    region: RegionDescriptor
    codec: str = "raw"


class Endpoint(Struct, frozen=True, array_like=True):
    """Where a worker serves reads of its regions, by their index; for transport `kind` alone."""

    kind: str
    address: str


class WorkerInfo(Struct, frozen=True, kw_only=True):
    """What a worker says of itself when it joins. `epoch` is new for every incarnation of a worker
    id. `regions` say how its memory is mapped on the same host, `endpoints` how it is read from
    anywhere. `address` is where nodes of the same private folder send messages, `remote_address`
    where all others do ("" where nothing listens). `host` names the machine, for people.
    """

    worker_id: WorkerId
    role: Role
    epoch: int
    address: str
    pid: int
    layout: KVLayout
    num_blocks: tuple[int, ...]
    max_model_len: int
    max_num_seqs: int
    regions: tuple[RegionDescriptor, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    engine: str = ""
    remote_address: str = ""
    host: str = ""
    profile: str = ""
    """Names what its steps are expected to take, for the time before it has run any."""
    max_num_batched_tokens: int = 0
    """Of a step; 0 where a log is older than this."""
    is_prefix_caching: bool = True
    handoff: Handoff = Handoff.STREAM
    tiers: tuple[TierRegion, ...] = ()
    """What workers of the same host may read below its pool."""

    @property
    def capacity_tokens(self) -> int:
        """Tokens whose KV fits at once."""
        return self.layout.capacity_tokens(self.num_blocks)
