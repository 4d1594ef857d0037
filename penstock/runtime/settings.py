"""What a local cluster is to be, and what is known of it once the model is loaded.

Frozen structs, filled in by the command line or the Python API; they travel to the host process.
"""

from msgspec import Struct

from penstock.core.block import KVLayout
from penstock.core.config import EngineConfig
from penstock.core.errors import StartupFailed
from penstock.core.types import Role, WorkerId

MODEL_EXECUTOR = "model"
INSTANT_EXECUTOR = "instant"
TRANSPORTS = ("auto", "shm", "nixl", "tcp")


class ClusterSettings(Struct, frozen=True, kw_only=True):
    """One host's cluster: which model, how many workers of which role, and their limits.

    `threads` is per worker, None shares the cores out. `executor` "instant" runs no model (see
    `instant.py`). `transport` is one of `TRANSPORTS`; auto is shared memory: all workers are on
    one host. `decision_log` is a file for the decisions of the controller; each worker's go to that
    name with its own behind it. `start_timeout_s` bounds each silence while the model loads, by
    default ten minutes, or a day where it has to be fetched.
    """

    engine: EngineConfig
    prefill: int = 1
    decode: int = 1
    mixed: int = 0
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    is_prefix_caching: bool = True
    executor: str = MODEL_EXECUTOR
    transport: str = "auto"
    threads: int | None = None
    is_pinned: bool = False
    decision_log: str | None = None
    start_timeout_s: float | None = None
    join_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        """Check that the workers can serve. Raises: `StartupFailed` naming the flags."""
        counts = {"--prefill": self.prefill, "--decode": self.decode, "--mixed": self.mixed}
        for flag, count in counts.items():
            if count < 0:
                raise StartupFailed(f"{flag}: {count} is not a number of workers")
        if not self.mixed and not (self.prefill and self.decode):
            raise StartupFailed(
                "at least one prefill and one decode worker, or one that does both, is needed: "
                "--prefill 1 --decode 1, or --mixed 1"
            )
        for flag, limit in {
            "--max-num-seqs": self.max_num_seqs,
            "--max-num-batched-tokens": self.max_num_batched_tokens,
        }.items():
            if limit < 1:
                raise StartupFailed(f"{flag}: {limit} is too small")

        if self.transport not in TRANSPORTS:
            raise StartupFailed(f"--transport: {self.transport!r} is none of {TRANSPORTS}")

    @property
    def num_workers(self) -> int:
        """Number of workers in all."""
        return self.prefill + self.decode + self.mixed

    def workers(self) -> dict[WorkerId, Role]:
        """Name the workers, in the order in which they are started."""
        counts = {Role.PREFILL: self.prefill, Role.DECODE: self.decode, Role.MIXED: self.mixed}
        return {
            WorkerId(f"{role.value}-{index}"): role
            for role, count in counts.items()
            for index in range(count)
        }


class ModelFacts(Struct, frozen=True, kw_only=True):
    """What the front needs to know of the loaded model. `num_blocks` is per KV group of each
    worker.

    `folder` is where its files are; `description` says in a line what runs it, for people.
    """

    folder: str

    layout: KVLayout
    num_blocks: tuple[int, ...]
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    description: str
