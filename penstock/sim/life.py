"""What every simulated worker has, whatever runs its steps: timers that end with it, and what it
says of itself when it joins.
"""

from collections.abc import Callable

from penstock.core.config import WorkerConfig
from penstock.core.descriptors import RegionDescriptor, TierRegion, WorkerInfo
from penstock.sim.clock import SimClock


class MortalClock:
    """The clock port of one worker: a process takes its timers with it."""

    def __init__(self, clock: SimClock, is_alive: Callable[[], bool]) -> None:
        self._clock = clock
        self._is_alive = is_alive

    def now_ns(self) -> int:
        """Return the simulated time."""
        return self._clock.now_ns()

    def call_at(self, at_ns: int, callback: Callable[[], None]) -> None:
        """Call back, unless dead by then."""
        self._clock.call_at(at_ns, lambda: callback() if self._is_alive() else None)


def introduction(config: WorkerConfig, profile: str = "") -> WorkerInfo:
    """Return what a simulated worker says of itself; `profile` names its hardware."""
    return WorkerInfo(
        worker_id=config.worker_id,
        role=config.role,
        epoch=config.epoch,
        address="sim",
        pid=0,
        layout=config.layout,
        num_blocks=config.num_blocks,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        is_prefix_caching=config.is_prefix_caching,
        handoff=config.handoff,
        profile=profile,
        host=config.host,
        tiers=tuple(
            TierRegion(tier.name, tier.name, RegionDescriptor("sim", "", 0, 0), tier.codec)
            for tier in config.tiers
        ),
    )
