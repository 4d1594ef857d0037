"""Compression engine: which block is encoded or decoded next, on how many lanes.

A lane works on one block at a time, beside the links: while one block is decoded the next one
crosses. The most urgent class first, the earliest deadline within it, as on the links. It owns the
queue and the books; `kv/orchestrator.py` submits, `penstock/sim/memory.py` counts the time.

A worker has the books alone, one per tier (`worker/shelf.py`): there the thread that copies a block
encodes or decodes it, out of slots in memory in the same pass, so that DMA scheduler and links
order both at once, and a queue of its own would cost another copy.
"""

from dataclasses import dataclass, field
from enum import Enum
from heapq import heappop, heappush

from penstock.core.events import MoveClass
from penstock.kv.dma import CLASSES
from penstock.kv.tiers import BlockKey, CodecSpec, Tier


class Direction(Enum):
    """Into fewer bytes, or back."""

    ENCODE = "encode"
    DECODE = "decode"


@dataclass(slots=True, eq=False)
class Job:
    """Encode or decode one block, whose copy in `tier` is whole when this is done."""

    key: BlockKey
    tier: Tier
    codec: CodecSpec
    direction: Direction
    kind: MoveClass
    deadline_ns: int
    started_ns: int = 0

    @property
    def duration_ns(self) -> int:
        """How long one lane works on it."""
        if self.direction is Direction.ENCODE:
            return self.codec.encode_ns
        return self.codec.decode_ns


@dataclass(slots=True)
class CodecBooks:
    """What codecs came to: blocks, the time of all who worked on them together, and for how long
    computation stood still for it.
    """

    num_done: dict[Direction, int] = field(default_factory=lambda: dict.fromkeys(Direction, 0))
    busy_ns: dict[Direction, int] = field(default_factory=lambda: dict.fromkeys(Direction, 0))
    exposed_ns: int = 0

    def note(self, direction: Direction, took_ns: int, *, num_blocks: int = 1) -> None:
        """Book work that has been done."""
        self.num_done[direction] += num_blocks
        self.busy_ns[direction] += took_ns

    def expose(self, waited_ns: int) -> None:
        """Book that computation stood still for so long because of encoding or decoding."""
        self.exposed_ns += waited_ns


class CompressionEngine:
    """A queue before `num_lanes` lanes."""

    def __init__(self, num_lanes: int = 1) -> None:
        self.num_lanes = num_lanes
        self.books = CodecBooks()
        self._heap: list[tuple[int, int, int, Job]] = []
        self._working: set[Job] = set()
        self._num_submitted = 0
        self._ahead_ns = 0

    @property
    def num_waiting(self) -> int:
        """How many jobs have not begun."""
        return len(self._heap)

    def submit(self, job: Job) -> None:
        """Queue a job."""
        self._num_submitted += 1
        rank = CLASSES.index(job.kind)
        self._ahead_ns += job.duration_ns
        heappush(self._heap, (rank, job.deadline_ns, self._num_submitted, job))

    def start(self, now_ns: int) -> list[Job]:
        """Return the jobs that free lanes begin now."""
        started = []
        while self._heap and len(self._working) < self.num_lanes:
            job = heappop(self._heap)[-1]
            job.started_ns = now_ns
            self._working.add(job)
            started.append(job)
        return started

    def finish(self, job: Job, now_ns: int) -> None:
        """Note that a lane is done with a job."""
        self._working.remove(job)
        self._ahead_ns -= job.duration_ns
        self.books.note(job.direction, now_ns - job.started_ns)

    def ahead_ns(self) -> float:
        """Return how long a new job of the lowest class would wait, work begun counted in full."""
        return self._ahead_ns / self.num_lanes
