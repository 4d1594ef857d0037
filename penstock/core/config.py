"""Settings as frozen, validated structs. The command line fills them in; nothing else reads flags
or the environment.
"""

from enum import Enum

from msgspec import Struct

from penstock.core.block import KVLayout
from penstock.core.errors import StartupFailed
from penstock.core.tiers import TierConfig
from penstock.core.types import NS_PER_MS, NS_PER_S, Role, WorkerId


class Handoff(Enum):
    """How the KV of a prompt crosses: pulled as its blocks are finished, pulled when all are, or
    written by the prefill worker into blocks that were reserved before it began.
    """

    STREAM = "stream"
    WHOLE = "whole"
    PUSH = "push"


class EngineConfig(Struct, frozen=True, kw_only=True):
    """Which model to run and how.

    `model` is a folder or a Hugging Face name. `dtype` "auto" takes bfloat16 where the device
    multiplies it natively, float32 elsewhere. `kv_cache_bytes` is the KV pool of one worker.
    `load_format` "dummy" makes random weights. `device` is cpu, cuda, cuda:N or auto; of a GPU's
    memory all workers on it together take `gpu_memory_utilization`, in equal shares. With
    `enforce_eager` no CUDA graphs are captured; `attention_backend` is what attends for prompts
    there: triton, fa3 or flashinfer.
    """

    model: str
    dtype: str = "auto"
    device: str = "cpu"
    load_format: str = "auto"
    model_impl: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    block_size: int = 32
    kv_cache_bytes: int | None = None
    max_model_len: int | None = None
    seed: int = 0
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    attention_backend: str = "triton"

    def __post_init__(self) -> None:
        """Check ranges. Raises: `StartupFailed` naming the flag."""
        share = self.gpu_memory_utilization
        _require(0 < share <= 1, "--gpu-memory-utilization", share)
        _require(
            self.attention_backend in ("triton", "fa3", "flashinfer"),
            "--attention-backend",
            self.attention_backend,
        )
        _require(self.dtype in ("auto", "float32", "bfloat16", "float16"), "--dtype", self.dtype)
        _require(
            self.block_size in (16, 32, 64, 128), "--block-size (16|32|64|128)", self.block_size
        )
        _require(
            self.model_impl in ("auto", "penstock", "transformers"), "--model-impl", self.model_impl
        )


class WireCodec(Struct, frozen=True, kw_only=True):
    """A lossy codec in which blocks may cross between hosts: the bytes of one as a row, digests
    included, and what encoding and decoding it take.
    """

    name: str
    row_bytes: int
    encode_ns: int = 0
    decode_ns: int = 0


class WorkerConfig(Struct, frozen=True, kw_only=True):
    """What a worker core needs to know of itself. `num_blocks` is per KV group."""

    worker_id: WorkerId
    role: Role
    epoch: int
    layout: KVLayout
    num_blocks: tuple[int, ...]
    max_model_len: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    eos_token_ids: tuple[int, ...] = ()
    is_prefix_caching: bool = True
    handoff: Handoff = Handoff.STREAM
    is_defragmenting: bool = True
    """Whether an idle worker moves cached blocks together, so that the next prompt lies in one."""
    load_interval_ns: int = NS_PER_S
    lease_ns: int = 5 * NS_PER_S
    """How long offered blocks are kept for a decode worker that says nothing."""
    names_interval_ns: int | None = 100 * NS_PER_MS
    """How often the controller is told, at most, which blocks came and went; None: never."""
    tiers: tuple[TierConfig, ...] = ()
    """What is below the pool, nearest first; only where there is one KV group without a window."""
    wire: WireCodec | None = None
    """In what blocks may be pulled over TCP; only where there is one KV group without a window."""
    host: str = ""
    """Workers of one host read each other's tiers."""
    max_rounds: int = 1
    """Decode steps that the executor may run in a row, each reported by itself and the next one
    under way meanwhile: while the device computes, its tokens are taken in.
    """
    max_repeats: int = 1
    """Decode steps that the executor may run in a row while nobody waits. Whoever asks for more
    than one has an executor that stops when something else comes: the simulator.
    """


class ControllerConfig(Struct, frozen=True, kw_only=True):
    """What the controller core needs to know.

    A lost worker's requests are retried `max_attempts - 1` times. `queue_timeout_ns` bounds the
    wait for a first worker, `wait_timeout_ns` that for room on one. `policy` chooses the workers of
    a request (`penstock/control/policies/`). A prefill worker is given requests until it has
    `admit_backlog_ms` of prefills ahead; the others wait at the controller.

    `slo_ttft_ms` and `slo_tpot_ms` are promises: what would break them by more than `slo_slack`
    times is refused, or waits. A request may bring its own. Where there is none, `usual_ttft_ms`
    and `usual_tpot_ms` say what loads are measured by, and nobody is refused for being late.

    With `is_switching_roles` workers change sides as the load asks for: it is looked at every
    `role_interval_ms`, and a change is left alone for `role_cooldown_ms`.

    With `workers_max` above 0 the runtime is asked for workers of its own host as the load wants
    them (`control/sizing.py`), and to retire those that have been of no use for `retire_after_ms`.
    """

    max_queued: int = 4096
    max_attempts: int = 3
    queue_timeout_ns: int = 30 * NS_PER_S
    wait_timeout_ns: int = 600 * NS_PER_S
    policy: str = "least_loaded"
    admit_backlog_ms: float = 250.0
    slo_ttft_ms: float | None = None
    slo_tpot_ms: float | None = None
    slo_slack: float = 1.0
    usual_ttft_ms: float = 1000.0
    usual_tpot_ms: float = 100.0
    is_switching_roles: bool = False
    role_interval_ms: float = 1000.0
    role_cooldown_ms: float = 5000.0
    workers_min: int = 0
    workers_max: int = 0
    resize_pause_ms: float = 5000.0
    retire_after_ms: float = 30_000.0


def _require(is_valid: bool, flag: str, value: object) -> None:
    if not is_valid:
        raise StartupFailed(f"{flag}: {value!r} is not a valid value")
