"""What to vary on the memory machine, and the rows that come out: liberties, sweeps, pressure.

Every study runs the baseline (raw) and ours (within the quality budget) under the same setups, so
that what differs is said by the setup. Called by `penstock sim memory` and `bench/kvflow.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from msgspec.structs import replace

from penstock.core.types import GIB, MIB
from penstock.kv.tiers import Tier
from penstock.sim.accesses import Accesses
from penstock.sim.hierarchy import LOSS, Setup, simulate
from penstock.sim.kvflow import TIERS
from penstock.sim.memory import MemoryFigures

HBM_BYTES_MAX = 708_837_376
"""What KVFlow reads from HBM in its published run: ours may not read more."""
PUBLISHED_EXPOSED_NS = 5_936_655.36
"""What its published baseline exposes: ours must expose less, by the honest accounting."""


@dataclass(frozen=True, slots=True)
class Row:
    """One run: in which study, of which policy, under which setting."""

    study: str
    setting: str
    policy: str
    setup: Setup
    figures: MemoryFigures


OnRow = Callable[[Row], None]
_PAIR = (("baseline", LOSS["raw"]), ("ours", LOSS["int8"]))
_KVFLOW = Setup()
_SMALL_SRAM = 16 * MIB


def run_pair(study: str, setting: str, setup: Setup, accesses: Accesses) -> Iterator[Row]:
    """Yield the baseline and ours under one setup."""
    for policy, loss_max in _PAIR:
        mine = replace(setup, loss_max=loss_max)
        yield Row(study, setting, policy, mine, simulate(mine, accesses))


def liberties() -> list[tuple[str, Setup]]:
    """Return setups from the barest to all that both may do; each adds one thing."""
    bare = replace(
        _KVFLOW,
        is_coalescing=False,
        lookahead_units=0,
        eviction="lru",
        staging_bytes=_SMALL_SRAM,
    )
    together = replace(bare, is_coalescing=True)
    staged = replace(together, staging_bytes=TIERS["sram"].capacity_bytes)
    ahead = replace(staged, lookahead_units=1)
    copies = replace(_KVFLOW, replica_tiers=(Tier.CXL, Tier.DRAM))
    return [
        ("block by block, 16 MiB of SRAM, on demand", bare),
        ("+ neighbours in one descriptor", together),
        ("+ 512 MiB of SRAM for blocks used again", staged),
        ("+ the next step's reads known", ahead),
        ("+ eviction by cost", _KVFLOW),
        ("+ copies in CXL and DRAM, soonest read", copies),
        ("+ two queues a link", replace(copies, num_queues=2)),
    ]


def sweeps(*, is_quick: bool = False) -> list[tuple[str, str, Setup]]:
    """Return (what is varied, its value, setup) around KVFlow's machine."""
    srams = (32, 128) if is_quick else (16, 32, 64, 128, 256, 512, 1024)
    hbms = (2,) if is_quick else (1, 2, 3, 4, 6)
    bandwidths = (1500,) if is_quick else (750, 1500, 3000, 6000, 12000)
    factors = (0.0, 4.0) if is_quick else (0.0, 0.5, 2.0, 3.0, 4.0)
    queues = (2,) if is_quick else (1, 2, 3, 4)
    lanes = () if is_quick else (1, 2, 4)
    depths = (0,) if is_quick else (0, 8, 32, 128, 4096)

    def vary(name: str, value: object, **changes: object) -> tuple[str, str, Setup]:
        return name, str(value), replace(_KVFLOW, **changes)

    return [
        *(vary("SRAM", f"{n} MiB", staging_bytes=n * MIB) for n in srams),
        *(vary("HBM", f"{n} GiB", hbm_bytes=n * GIB) for n in hbms),
        *(
            vary("HBM bandwidth", f"{n} {unit}", hbm_bandwidth=n, unit_bits=bits)
            for n in bandwidths
            for bits, unit in ((8, "Gbit/s"), (1, "GB/s"))
        ),
        *(vary("decoding time", f"x{x:g}", codec_factor=x) for x in factors),
        *(vary("queues", n, num_queues=n) for n in queues),
        *(vary("decoder lanes", n, num_lanes=n) for n in lanes),
        *(vary("prefetch depth, 2 queues", n, num_queues=2, prefetch_depth=n) for n in depths),
        *(vary("eviction", name, eviction=name) for name in ("lru", "arc", "cost")),
    ]


def pressure(*, hbm_bytes: int, staging_bytes: int) -> list[tuple[str, Setup]]:
    """Return setups for a context that HBM cannot hold: what peers do, and what is possible."""
    plain = replace(
        _KVFLOW,
        hbm_bytes=hbm_bytes,
        staging_bytes=staging_bytes,
        lookahead_units=0,
        eviction="lru",
        num_queues=4,
    )
    # Everything has a copy in CXL, so that HBM is a cache whose blocks can be given up at once.
    cached = replace(plain, replica_tiers=(Tier.CXL,), cache_tiers=(Tier.HBM,))
    by_cost = replace(cached, eviction="cost")
    return [
        ("every block in one tier, LRU, on demand", plain),
        ("HBM as a cache of CXL, LRU", cached),
        ("the same, ARC-like", replace(cached, eviction="arc")),
        ("the same, by cost", by_cost),
        ("the same, by cost, next layer guessed", replace(by_cost, lookahead_units=1)),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether ours reads as little as KVFlow and exposes less than the baseline, both at once.

    Ours is KVFlow's machine, one queue a link, every block in HBM alone. `best_baseline_ns` is the
    least that the baseline exposes with one queue a link, copies in every tier included.
    """

    hbm_bytes: int
    exposed_ns: int
    baseline_ns: int
    best_baseline_ns: int

    @property
    def is_met(self) -> bool:
        """Both targets, against the baseline at its best."""
        return self.hbm_bytes <= HBM_BYTES_MAX and self.exposed_ns < self.best_baseline_ns


def judge(rows: list[Row]) -> Verdict:
    """Return the verdict from the rows of `liberties`."""
    ours, baseline = (
        next(
            row.figures
            for row in rows
            if row.policy == policy and row.setup == replace(_KVFLOW, loss_max=loss_max)
        )
        for policy, loss_max in (_PAIR[1], _PAIR[0])
    )
    others = [r for r in rows if r.policy == "baseline" and r.study == "liberties"]
    return Verdict(
        hbm_bytes=ours.hbm_bytes,
        exposed_ns=ours.exposed_ns,
        baseline_ns=baseline.exposed_ns,
        best_baseline_ns=min(r.figures.exposed_ns for r in others if r.setup.num_queues == 1),
    )


def frontier_rows(rows: list[Row]) -> list[Row]:
    """Return the rows that no other beats in both HBM bytes and exposed time."""
    return [
        row
        for row in rows
        if not any(
            other.figures.hbm_bytes <= row.figures.hbm_bytes
            and other.figures.exposed_ns <= row.figures.exposed_ns
            and (other.figures.hbm_bytes, other.figures.exposed_ns)
            != (row.figures.hbm_bytes, row.figures.exposed_ns)
            for other in rows
        )
    ]


def figures_of(row: Row) -> dict[str, object]:
    """Return a row as plain values, for JSON."""
    f = row.figures
    return {
        "study": row.study,
        "setting": row.setting,
        "policy": row.policy,
        "hbm_bytes": f.hbm_bytes,
        "read_bytes": {tier.value: size for tier, size in f.read_bytes.items() if size},
        "write_bytes": {tier.value: size for tier, size in f.write_bytes.items() if size},
        "exposed_ns": f.exposed_ns,
        "exposed_transfer_ns": f.exposed_transfer_ns,
        "exposed_decode_ns": f.exposed_decode_ns,
        "compute_ns": f.compute_ns,
        "total_ns": f.total_ns,
        "num_accesses": f.num_accesses,
        "num_hits": f.num_hits,
        "num_recomputed": f.num_recomputed,
        "num_descriptors": f.num_descriptors,
        "num_transfers": f.num_transfers,
        "num_decoded": f.num_decoded,
        "decoder_busy_ns": f.decoder_busy_ns,
        "link_busy_ns": f.link_busy_ns,
        "prefetch": {
            "used": f.prefetch.used,
            "late": f.prefetch.late,
            "missed": f.prefetch.missed,
            "wasted": f.prefetch.wasted,
            "dropped": f.prefetch.dropped,
        },
    }
