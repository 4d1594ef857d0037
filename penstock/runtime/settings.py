"""What a local cluster is to be, and what is known of it once the model is loaded.

Frozen structs, filled in by the command line or the Python API; they travel to the host process.
"""

from msgspec import Struct

from penstock.core.block import KVLayout
from penstock.core.config import ControllerConfig, EngineConfig, Handoff
from penstock.core.errors import StartupFailed
from penstock.core.types import Role, WorkerId
from penstock.kv.quality import KvQuality
from penstock.kv.tiers import RAW

MODEL_EXECUTOR = "model"
INSTANT_EXECUTOR = "instant"
AUTO = "auto"
DEVICE_LOAD_TIMEOUT_S = 900.0
EXACT_CODECS = (RAW, "lossless")
TRANSPORTS = (AUTO, "shm", "nixl", "tcp")


class NetworkSettings(Struct, frozen=True, kw_only=True):
    """How this host's processes are reached from other hosts.

    They listen at `host`, one of this machine's addresses (0.0.0.0 for all), and are called by
    `advertised`, the same if "". `port` is the controller's; workers take free ones. `key_file`
    holds the cluster key; None means where `transport/key.py` looks.
    """

    host: str
    port: int = 0
    advertised: str = ""
    key_file: str | None = None


class PulseSettings(Struct, frozen=True, kw_only=True):
    """How the controller and its workers know of each other that they are alive.

    Both speak every `interval_s`. Who has been silent for `suspect_after_s` gets nothing new while
    there are others, and counts as dead after `lost_after_s`, and so does a worker whose step takes
    longer than `step_timeout_s`. A worker on another host whose controller is silent looks for it
    for `rejoin_timeout_s`.
    """

    interval_s: float = 1.0
    suspect_after_s: float = 3.0
    lost_after_s: float = 10.0
    step_timeout_s: float = 300.0
    rejoin_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        """Check the order. Raises: `StartupFailed` naming the flags."""
        if not 0 < self.interval_s < self.suspect_after_s <= self.lost_after_s:
            raise StartupFailed(
                f"--lost-after {self.lost_after_s:g}: it must be longer than three times the "
                f"--heartbeat-interval of {self.interval_s:g} s"
            )


class TierSettings(Struct, frozen=True, kw_only=True):
    """A tier below the workers' pools, for all of them together; `path` is a folder on disk.

    `codec` is how blocks lie there: raw, the name of a codec, or auto. "" is raw where blocks must
    come back bit for bit, and auto where `--kv-quality` allows a loss.
    """

    name: str
    num_bytes: int
    path: str = ""
    codec: str = ""


class TierCodec(Struct, frozen=True, kw_only=True):
    """How blocks lie in a tier, as found when the model was loaded: times are those of a block."""

    name: str = RAW
    is_lossy: bool = False
    slot_bytes: int = 0
    encode_ns: int = 0
    decode_ns: int = 0
    bytes_per_s: int = 0
    """Of the tier itself, measured; 0 where nothing had to be decided."""


class ClusterSettings(Struct, frozen=True, kw_only=True):
    """One host's cluster: which model, how many workers of which role, and their limits.

    `threads` is per worker, None shares the cores out. `executor` "instant" runs no model (see
    `instant.py`). `transport` is one of `TRANSPORTS`; auto is shared memory: all workers are on
    one host; `tcp_streams` connections share a pull over TCP, None is as many as pay here. Between
    hosts blocks may cross in `handoff_codec`. `network` lets other hosts take part; without it
    nothing listens to them. `host` is what this one is called, "" for that of the controller.
    `decision_log` is a file for the decisions of the controller; each worker's go to that name with
    its own behind it.
    `control` is for the controller, which decides for all hosts. `tiers` are nearest first,
    and give blocks up in the order that `kv_eviction` names (`kv/eviction.py`); `kv_quality` is
    what their codecs may cost the model. What decode steps attend to goes to `kv_access_log` with
    a worker's process id behind it.
    `start_timeout_s` bounds each silence while the model loads, by default ten minutes, or a day
    where it has to be fetched.
    """

    engine: EngineConfig
    prefill: int = 1
    decode: int = 1
    mixed: int = 0
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    is_prefix_caching: bool = True
    executor: str = MODEL_EXECUTOR
    transport: str = AUTO
    tcp_streams: int | None = None
    threads: int | None = None
    is_pinned: bool = False
    decision_log: str | None = None
    start_timeout_s: float | None = None
    join_timeout_s: float = 60.0
    network: NetworkSettings | None = None
    pulse: PulseSettings = PulseSettings()
    host: str = ""
    handoff: Handoff = Handoff.STREAM
    handoff_codec: str = RAW
    control: ControllerConfig = ControllerConfig()
    tiers: tuple[TierSettings, ...] = ()
    kv_quality: KvQuality = KvQuality()
    kv_access_log: str | None = None
    kv_eviction: str = "lru"

    def __post_init__(self) -> None:
        """Check that the workers can serve. Raises: `StartupFailed` naming the flags."""
        counts = {"--prefill": self.prefill, "--decode": self.decode, "--mixed": self.mixed}
        for flag, count in counts.items():
            if count < 0:
                raise StartupFailed(f"{flag}: {count} is not a number of workers")
        is_alone = self.network is None
        if is_alone and not self.mixed and not (self.prefill and self.decode):
            raise StartupFailed(
                "at least one prefill and one decode worker, or one that does both, is needed: "
                "--prefill 1 --decode 1, or --mixed 1 (or --listen HOST:PORT, for workers of other "
                "hosts to join)"
            )
        for flag, limit in {
            "--max-num-seqs": self.max_num_seqs,
            "--max-num-batched-tokens": self.max_num_batched_tokens,
            "--tcp-streams": self.tcp_streams,
        }.items():
            if limit is not None and limit < 1:
                raise StartupFailed(f"{flag}: {limit} is too small")

        names = [tier.name for tier in self.tiers]
        if len(set(names)) < len(names):
            raise StartupFailed(f"--kv-tier: each tier once, not {', '.join(names)}")
        if "disk" in names[:-1]:
            raise StartupFailed("--kv-tier: disk comes last, nothing sinks out of it")
        self._check_codecs()
        if self.transport not in TRANSPORTS:
            raise StartupFailed(f"--transport: {self.transport!r} is none of {TRANSPORTS}")
        if self.handoff is Handoff.PUSH and self.transport not in (AUTO, "shm"):
            raise StartupFailed(
                f"--handoff push: over {self.transport} blocks are only read: leave --transport "
                "out, or use --handoff stream"
            )

        self._check_limits()

    def accepts_window(self, facts: "ModelFacts") -> bool:
        """True when a request may go on without all its KV: `kv_window` and `kv_select`."""
        groups = facts.layout.groups if facts.layout is not None else ()
        has_model = self.executor != INSTANT_EXECUTOR
        is_whole = len(groups) == 1 and not groups[0].window
        return has_model and is_whole and not self.kv_quality.is_exact

    def _check_codecs(self) -> None:
        """Check in what blocks may lie and cross. Raises: `StartupFailed` naming the flags."""
        lossy = {tier.codec for tier in self.tiers} - {"", AUTO, *EXACT_CODECS}
        flag = "--kv-tier" if lossy else "--handoff-codec"
        lossy |= {self.handoff_codec} - {RAW}
        if lossy and self.kv_quality.is_exact:
            raise StartupFailed(
                f"{flag}: {', '.join(sorted(lossy))} is lossy, and --kv-quality is exact: say "
                "what the model's loss may rise by, such as --kv-quality 0.1%"
            )
        if len(lossy) > 1:
            raise StartupFailed(
                f"{flag}: one lossy codec for all tiers and hand-offs, not "
                f"{', '.join(sorted(lossy))}: what a block loses by one after the other is not "
                "measured"
            )
        if self.handoff_codec == RAW:
            return
        is_wired = self.transport == "tcp" or (self.transport == AUTO and self.network is not None)
        if not is_wired or self.handoff is Handoff.PUSH:
            raise StartupFailed(
                "--handoff-codec: only what is pulled over TCP crosses encoded: it goes with "
                "--listen or --transport tcp, and not with --handoff push"
            )

    def _check_limits(self) -> None:
        """Check how many workers there may be. Raises: `StartupFailed` naming the flags."""
        least, most = self.control.workers_min, self.control.workers_max
        if not most:
            return
        counts = f"--prefill {self.prefill} --decode {self.decode} --mixed {self.mixed}"
        if not self.num_workers:
            raise StartupFailed(
                f"--max-workers: {counts} load no model here, so no worker can be started"
            )
        if least > most:
            raise StartupFailed(f"--min-workers {least} is more than --max-workers {most}")
        if self.num_workers > most:
            raise StartupFailed(
                f"--max-workers {most}: {counts} are {self.num_workers} workers to begin with"
            )
        if self.num_workers < least:
            raise StartupFailed(
                f"--min-workers {least}: {counts} are only {self.num_workers}; begin with more"
            )

    @property
    def worker_timeout_s(self) -> float:
        """How long a worker that was forked may take to say hello; on a device it loads first."""
        return self.join_timeout_s if self.engine.device == "cpu" else DEVICE_LOAD_TIMEOUT_S

    @property
    def num_workers(self) -> int:
        """Number of workers in all, to begin with."""
        return self.prefill + self.decode + self.mixed

    @property
    def most_workers(self) -> int:
        """Number of workers that cores and memory have to do for."""
        return max(self.num_workers, self.control.workers_max)

    def workers(self) -> dict[WorkerId, Role]:
        """Name the workers, in the order in which they are started."""
        counts = {Role.PREFILL: self.prefill, Role.DECODE: self.decode, Role.MIXED: self.mixed}
        stem = f"{self.host}-" if self.host else ""
        return {
            WorkerId(f"{role.value}-{stem}{index}"): role
            for role, count in counts.items()
            for index in range(count)
        }


class ModelFacts(Struct, frozen=True, kw_only=True):
    """What the front needs to know of the loaded model. `num_blocks` is per KV group of each
    worker. Where all workers are on other hosts nothing is loaded: no `layout`, no blocks.

    `folder` is where its files are; `description` says in a line what runs it, and `tiers` what is
    below the KV caches, for people.
    """

    folder: str

    layout: KVLayout | None
    num_blocks: tuple[int, ...]
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    description: str
    tiers: str = ""
    tier_codecs: tuple[TierCodec, ...] = ()
    """Of each tier of the settings; empty when all are raw."""
    wire: TierCodec | None = None
    """Of blocks that cross between hosts."""
    codec_notes: tuple[str, ...] = ()
    """What was measured, admitted and refused, a line each, for people."""


def split_address(text: str, flag: str) -> tuple[str, int]:
    """Return host and port of `HOST:PORT` or `[HOST]:PORT`.

    Raises: `StartupFailed` naming the flag.
    """
    host, _, port = text.removeprefix("tcp://").rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise StartupFailed(f"{flag} {text}: give it as HOST:PORT, such as 10.0.0.5:7777")
    return host.strip("[]"), int(port)
