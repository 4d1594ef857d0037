"""`TierCosts`: what computing, fetching and writing blocks would take at this moment.

Computing is learnt from steps, each by as many tokens as it had, so that the short last step after
a fetch does not make computing seem slow; links are learnt from moves. Queues count as they are
now. The decisions themselves are `kv/policy.py`'s. Called by `worker/tiers.py` and
`worker/onboard.py`.
"""

from typing import Final

from penstock.core.config import WorkerConfig
from penstock.core.events import MoveClass
from penstock.core.types import NS_PER_S
from penstock.kv.tiers import Tier
from penstock.worker.scheduler import Scheduler
from penstock.worker.traffic import Traffic

HALF_LIFE_TOKENS: Final = 8192
"""What has been learnt from a step weighs half when so many tokens more have been computed."""
PREFILL_TOKENS_MIN: Final = 16
"""Steps of fewer tokens say little about what a prompt costs."""
BATCH_BLOCKS: Final = 16
"""So many blocks share the latency of a move, when one of them is asked for by itself."""


class TierCosts:
    """Predictions in ns, for `num_blocks` blocks of the one KV group."""

    def __init__(self, config: WorkerConfig, traffic: Traffic) -> None:
        self._traffic = traffic
        self._block_size = config.layout.block_size
        self.block_bytes = config.layout.block_bytes[0]
        self._num_tokens = self._took_ns = 0.0

    def note_step(self, num_tokens: int, took_ns: int) -> None:
        """Remember what computing costs; a step that took no time was computed by nobody."""
        if num_tokens < PREFILL_TOKENS_MIN or not took_ns:
            return
        kept = 0.5 ** (num_tokens / HALF_LIFE_TOKENS)
        self._num_tokens = kept * self._num_tokens + num_tokens
        self._took_ns = kept * self._took_ns + took_ns

    def recompute_ns(self, num_blocks: int) -> float:
        """Predict how long computing takes; before the first step, longer than any fetch."""
        if not self._num_tokens:
            return float(num_blocks * NS_PER_S)
        return num_blocks * self._block_size * self._token_ns

    def fetch_ns(self, tier: Tier, num_blocks: int) -> float:
        """Predict how long so many blocks take out of a tier, behind what is on its way."""
        num_bytes = num_blocks * self.block_bytes
        return self._traffic.predict_ns((tier, Tier.HBM), MoveClass.ONBOARD, num_bytes)

    def move_ns(self, source: Tier, destination: Tier) -> float:
        """Return what one block of a batch occupies a link for."""
        num_bytes = BATCH_BLOCKS * self.block_bytes
        return self._traffic.dma.alone_ns((source, destination), num_bytes) / BATCH_BLOCKS

    def turn_ns(self, scheduler: Scheduler) -> float:
        """Predict in how long a new request would get its turn: when all before it are computed."""
        ahead = [*scheduler.running, *scheduler.waiting]
        num_tokens = sum(s.target_tokens - s.num_computed for s in ahead)
        return num_tokens * self._token_ns

    @property
    def _token_ns(self) -> float:
        return self._took_ns / self._num_tokens if self._num_tokens else 0.0
