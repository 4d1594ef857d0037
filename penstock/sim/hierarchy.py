"""KVFlow's memory hierarchy for our orchestrator, and one run over it.

`Setup` says how the machine is used; a study (`penstock/sim/memory_study.py`) varies it.
The baseline and ours differ in nothing but `loss_max`, the quality budget: 0 keeps every block raw.
What either may do besides (neighbours in one descriptor, queues, eviction, copies in several tiers,
prefetching) is open to both.
"""

from msgspec import Struct

from penstock.core.types import GIB, MIB
from penstock.kv.orchestrator import Orchestrator, OrchestratorConfig
from penstock.kv.policy import choose_codec
from penstock.kv.tiers import RAW, CodecSpec, LinkSpec, Tier, TierSpec
from penstock.sim.accesses import Accesses
from penstock.sim.kvflow import DECODE_NS, SHRINK, STAGE_NS, TIERS, TierName
from penstock.sim.memory import LinearPlaces, MemoryFigures, MemoryMachine, Timing

LOSS = {"raw": 0.0, "int8": 0.001, "int4": 0.01}
"""What each codec may cost in held-out loss, for the quality budget: the targets of the codecs."""
_NAMES: dict[Tier, TierName] = {Tier.HBM: "hbm", Tier.CXL: "cxl", Tier.DRAM: "dram"}
NEIGHBOURS = 1.67
"""Blocks that ride in one descriptor in KVFlow's workload: 20,288 reads of 12,192 runs."""


class Setup(Struct, frozen=True, kw_only=True):
    """One way to use the machine. The defaults are KVFlow's hardware and our policy."""

    loss_max: float = LOSS["int8"]
    is_coalescing: bool = True
    lookahead_units: int = 1
    num_queues: int = 1
    num_lanes: int = 1
    eviction: str = "cost"
    replica_tiers: tuple[Tier, ...] = ()
    """Tiers that hold a copy of every block of HBM as well, if they have room."""
    cache_tiers: tuple[Tier, ...] = ()
    staging_bytes: int = TIERS["sram"].capacity_bytes
    hbm_bytes: int = TIERS["hbm"].capacity_bytes
    unit_bits: int = 8
    """8: bandwidths are Gbit/s, as KVFlow computes. 1: GB/s, as it writes."""
    hbm_bandwidth: float = TIERS["hbm"].bandwidth
    codec_factor: float = 1.0
    """Scales the time that decoding takes."""
    prefetch_depth: int = 4096


def codecs(setup: Setup, block_bytes: int) -> tuple[CodecSpec, ...]:
    """Return KVFlow's codecs; encoding takes as long as decoding, which KVFlow leaves out."""
    return tuple(
        CodecSpec(
            name=name,
            block_bytes=block_bytes // SHRINK[name],
            encode_ns=round(DECODE_NS[name] * setup.codec_factor),
            decode_ns=round(DECODE_NS[name] * setup.codec_factor),
            loss=LOSS[name],
        )
        for name in SHRINK
    )


def links(setup: Setup) -> tuple[LinkSpec, ...]:
    """Return a link from every tier to staging; with a cache in HBM also those into it and out.

    A link is as fast as the slower of its ends.
    """
    ways = [(tier, Tier.STAGING) for tier in _NAMES]
    if Tier.HBM in setup.cache_tiers:
        ways += [(Tier.STAGING, Tier.HBM), (Tier.HBM, Tier.CXL)]

    def bandwidth(tier: Tier) -> float:
        is_hbm = tier is Tier.HBM
        return setup.hbm_bandwidth if is_hbm else TIERS[_NAMES[tier]].bandwidth

    return tuple(
        LinkSpec(
            source=source,
            destination=destination,
            latency_ns=max(
                TIERS[_NAMES[t]].latency_ns for t in (source, destination) if t in _NAMES
            ),
            bytes_per_ns=min(bandwidth(t) for t in (source, destination) if t in _NAMES)
            / setup.unit_bits,
            num_queues=setup.num_queues,
        )
        for source, destination in ways
    )


def timing(setup: Setup, accesses: Accesses) -> Timing:
    """Return the times that are not a link's. A read of SRAM: its latency and the raw bytes."""
    sram = TIERS["sram"]
    read_ns = sram.latency_ns + accesses.block_bytes * setup.unit_bits / sram.bandwidth
    return Timing(
        compute_ns=accesses.compute_ns,
        stage_ns=STAGE_NS,
        read_ns=round(read_ns),
        lookahead_units=setup.lookahead_units,
    )


def build(setup: Setup, accesses: Accesses) -> Orchestrator:
    """Return an orchestrator with every block in its place: the latest in HBM, the rest below."""
    specs = codecs(setup, accesses.block_bytes)
    ways = links(setup)
    config = OrchestratorConfig(
        tiers=(
            TierSpec(tier=Tier.STAGING, capacity_bytes=setup.staging_bytes),
            TierSpec(tier=Tier.HBM, capacity_bytes=setup.hbm_bytes),
            TierSpec(tier=Tier.CXL, capacity_bytes=TIERS["cxl"].capacity_bytes),
            TierSpec(tier=Tier.DRAM, capacity_bytes=TIERS["dram"].capacity_bytes),
        ),
        links=ways,
        codecs=specs,
        target=Tier.STAGING,
        cache_tiers=setup.cache_tiers,
        eviction=setup.eviction,
        num_lanes=setup.num_lanes,
        prefetch_depth=setup.prefetch_depth,
        descriptor_bytes_max=MIB if setup.is_coalescing else 1,
    )
    orchestrator = Orchestrator(config, LinearPlaces())
    codec = choose_codec(
        specs,
        ways[0],
        loss_max=setup.loss_max,
        num_lanes=setup.num_lanes,
        blocks_per_descriptor=NEIGHBOURS if setup.is_coalescing else 1.0,
    )
    for _, number in sorted(zip(accesses.recency, accesses.blocks, strict=True), reverse=True):
        name = codec.name if number in accesses.lossy else RAW
        home = next(
            tier
            for tier in (Tier.HBM, Tier.CXL, Tier.DRAM)
            if orchestrator.store(number, tier, name)
        )
        for tier in setup.replica_tiers:
            if tier is not home:
                orchestrator.store(number, tier, name)
    return orchestrator


def simulate(setup: Setup, accesses: Accesses) -> MemoryFigures:
    """Run a workload; return the figures. The orchestrator's books are checked at the end."""
    orchestrator = build(setup, accesses)
    figures = MemoryMachine(orchestrator, timing(setup, accesses)).run(
        accesses.units, accesses.hints
    )
    orchestrator.check()
    return figures


def describe(setup: Setup) -> str:
    """Return a setup in a few words."""
    words = [
        "int8" if setup.loss_max else "raw",
        f"{setup.num_queues} queue{'s' * (setup.num_queues > 1)}",
        "neighbours together" if setup.is_coalescing else "block by block",
        f"looks {setup.lookahead_units} ahead",
        setup.eviction,
        f"SRAM {setup.staging_bytes // MIB} MiB",
        f"HBM {setup.hbm_bytes / GIB:g} GiB",
    ]
    if setup.replica_tiers:
        words.append("copies in " + "+".join(tier.value for tier in setup.replica_tiers))
    return ", ".join(words)
