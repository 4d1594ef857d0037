"""KVFlow's published experiment to the digit: its workload, its tiers, and its own accounting.

It owns what was published, quirks included, so that the honest accounting (`sim/memory.py`) can be
held against it. It uses none of our policy. Called by `penstock sim memory` and `bench/kvflow.py`.

The workload: 32 layers of 32 heads, head_dim 128, fp16; a block is 128 tokens of one head of one
layer, K and V, 65,536 bytes. In step s every layer reads five blocks: the current block and the two
before it of one head, the one 8 back of another, and one that hops over the context of a third.
20,288 reads in 128 steps. The context, 4.29 GB, fits HBM (8 GiB): nothing forces a block out.

The quirks, each of which `sim/memory.py` does without:
* `bandwidth_gbps` is used as Gbit/s, while the documents say GB/s (`unit="gbyte"` is the other).
* Moves between tiers and compressing take no time and no bandwidth.
* A hit in SRAM is charged to HBM as bytes read, and takes no time. Reading HBM for a prefetch is
  not charged at all.
* A step takes max(compute, transfer + decompression); *exposed* is max(0, transfer - compute), so
  decompression is not part of it.
* A block that was cold is raw again when it is read as hot, although its bits are gone.

`charged=True` keeps the algebra of a step and repairs the second and the third: a move is read from
where the block was (the slower of that read and the write counts), a hit reads nothing, a prefetch
reads what it brings.

Source: KVFlow (github.com/manishklach/KVFlow, commit 3942e4d), from its definition, no code.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from penstock.core.types import GIB, MIB

NUM_LAYERS: Final = 32
NUM_HEADS: Final = 32
NUM_BLOCKS: Final = 64
"""Blocks of one head of one layer: a context of 8192 tokens."""
BLOCK_TOKENS: Final = 128
BLOCK_BYTES: Final = 2 * BLOCK_TOKENS * 128 * 2
NUM_STEPS: Final = 128
COMPUTE_NS: Final = 180
STAGE_NS: Final = 40
PREFETCHES_PER_STEP: Final = 48
HOT_TOKENS: Final = 128
WARM_TOKENS: Final = 768
"""Blocks that start later are cold before the first step."""
INT4_TOKENS: Final = 768
WARM_USES: Final = 2

TierName = Literal["sram", "hbm", "cxl", "dram"]
CodecName = Literal["raw", "int8", "int4"]


class PublishedTier(NamedTuple):
    """Constants of a tier; `bandwidth` is Gbit/s or GB/s, whichever one reads into it."""

    capacity_bytes: int
    bandwidth: int
    latency_ns: int


TIERS: Final[dict[TierName, PublishedTier]] = {
    "sram": PublishedTier(512 * MIB, 20_000, 25),
    "hbm": PublishedTier(8 * GIB, 3_000, 300),
    "cxl": PublishedTier(24 * GIB, 300, 900),
    "dram": PublishedTier(64 * GIB, 120, 1_800),
}
SHRINK: Final[dict[CodecName, int]] = {"raw": 1, "int8": 2, "int4": 4}
DECODE_NS: Final[dict[CodecName, int]] = {"raw": 0, "int8": 120, "int4": 260}


class HeadBlock(NamedTuple):
    """The name of a block: `position` counts 128 tokens at a time."""

    layer: int
    head: int
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedSpec:
    """Which run. `is_tiered` False is the baseline: everything warm in HBM, raw, no prefetch.

    `cold_tier` is where cold blocks go; the published run's is "cxl".
    """

    is_tiered: bool = True
    cold_tier: TierName = "cxl"
    unit: Literal["gbit", "gbyte"] = "gbit"
    charged: bool = False


@dataclass(slots=True)
class PublishedFigures:
    """What the run prints; times in ns."""

    read_bytes: dict[TierName, int] = field(default_factory=lambda: dict.fromkeys(TIERS, 0))
    num_accesses: int = 0
    num_hits: int = 0
    num_compressions: int = 0
    num_prefetched: int = 0
    num_staged: int = 0
    moved_bytes: int = 0
    exposed_ns: float = 0.0
    decompression_ns: float = 0.0
    total_ns: float = 0.0

    @property
    def hbm_bytes(self) -> int:
        """Bytes read from HBM."""
        return self.read_bytes["hbm"]

    @property
    def hit_rate(self) -> float:
        """Share of accesses that found their block in SRAM."""
        return self.num_hits / self.num_accesses if self.num_accesses else 0.0


@dataclass(slots=True)
class _Home:
    """Where a block is, as KVFlow sees it; `worst` is the coarsest codec it has ever been in."""

    tier: TierName
    codec: CodecName
    temperature: Literal["hot", "warm", "cold"]
    worst: CodecName
    num_uses: int = 0


def current_block(step: int) -> int:
    """Return the block that is being written in this step: two steps for each."""
    return min(NUM_BLOCKS - 1, step // 2)


def accesses(step: int) -> list[HeadBlock]:
    """Return what a step reads, in order, duplicates included: up to five blocks a layer."""
    current = current_block(step)
    blocks = []
    for layer in range(NUM_LAYERS):
        recent = (step + layer) % NUM_HEADS
        blocks += [HeadBlock(layer, recent, i) for i in range(max(0, current - 2), current + 1)]
        blocks.append(HeadBlock(layer, (3 * step + layer) % NUM_HEADS, max(0, current - 8)))
        blocks.append(HeadBlock(layer, (7 * step + layer) % NUM_HEADS, (11 * step) % NUM_BLOCKS))
    return blocks


def seed_codec(index: int) -> CodecName:
    """Return how KVFlow stores a block before the first step."""
    return "raw" if index * BLOCK_TOKENS <= WARM_TOKENS else "int8"


class PublishedRun:
    """One run of the experiment in KVFlow's own accounting."""

    def __init__(self, spec: PublishedSpec) -> None:
        self.spec = spec
        self.figures = PublishedFigures()
        self.delivered: list[tuple[HeadBlock, CodecName]] = []
        """What each access could at best get: the coarsest codec its block had been through."""
        self._homes: dict[HeadBlock, _Home] = {}
        self._staged: set[HeadBlock] = set()
        self._coming: dict[HeadBlock, float] = {}
        self._now_ns = 0.0
        self._dma_free_ns = 0.0
        self._decoder_free_ns = 0.0

    def run(self) -> PublishedFigures:
        """Run all steps; return the figures."""
        for step in range(NUM_STEPS):
            self._step(step)
        self.figures.total_ns = self._now_ns
        return self.figures

    def _step(self, step: int) -> None:
        for block in [b for b, ready_ns in self._coming.items() if ready_ns <= self._now_ns]:
            del self._coming[block]
            self._staged.add(block)
            self.figures.num_staged += 1
        blocks = accesses(step)
        moves_ns = 0.0
        if self.spec.is_tiered:
            moves_ns = sum(self._place(block, current_block(step)) for block in blocks)
            # Nothing follows the last step: it prefetches for itself, 48 blocks nobody reads.
            self._prefetch(min(step + 1, NUM_STEPS - 1))
        self.delivered += [(block, self._home(block).worst) for block in blocks]
        self._serve(blocks, moves_ns)
        self._staged = {b for b in self._staged if self._home(b).temperature != "cold"}

    def _home(self, block: HeadBlock) -> _Home:
        home = self._homes.get(block)
        if home is None:
            home = self._homes[block] = self._seed(block.position)
        return home

    def _seed(self, index: int) -> _Home:
        start = index * BLOCK_TOKENS
        if not self.spec.is_tiered:
            return _Home("hbm", "raw", "warm", "raw")
        if start <= HOT_TOKENS:
            return _Home("hbm", "raw", "hot", "raw")
        if start <= WARM_TOKENS:
            return _Home("cxl", "raw", "warm", "raw")
        return _Home("dram", "int8", "cold", "int8")

    def _place(self, block: HeadBlock, current: int) -> float:
        """Move a block to where its temperature says; return the time charged for it."""
        home = self._home(block)
        age = max(0, current - block.position) * BLOCK_TOKENS
        old_tier, old_codec = home.tier, home.codec
        if age <= HOT_TOKENS:
            home.temperature = "hot"
        else:
            home.temperature = "warm" if home.num_uses >= WARM_USES else "cold"
        is_cold = home.temperature == "cold"
        home.tier = self.spec.cold_tier if is_cold else "hbm"
        home.codec = ("int4" if age >= INT4_TOKENS else "int8") if is_cold else "raw"
        home.worst = max(home.worst, home.codec, key=SHRINK.__getitem__)
        home.num_uses += 1
        if home.codec not in (old_codec, "raw"):
            self.figures.num_compressions += 1
        if home.tier == old_tier:
            return 0.0
        self.figures.moved_bytes += _num_bytes(home.codec)
        if not self.spec.charged:
            return 0.0
        self.figures.read_bytes[old_tier] += _num_bytes(old_codec)
        return max(self._read_ns(old_tier, old_codec), self._read_ns(home.tier, home.codec))

    def _prefetch(self, step: int) -> None:
        """Send hot blocks of the next step through one queue, one decompressor, into SRAM."""
        started = 0
        for block in accesses(step):
            if started == PREFETCHES_PER_STEP:
                break
            home = self._home(block)
            if block in self._staged or block in self._coming or home.temperature != "hot":
                continue
            started += 1
            self.figures.moved_bytes += _num_bytes(home.codec)
            if self.spec.charged:
                self.figures.read_bytes[home.tier] += _num_bytes(home.codec)
            self._dma_free_ns = max(self._dma_free_ns, self._now_ns)
            self._dma_free_ns += self._read_ns(home.tier, home.codec)
            self._decoder_free_ns = max(self._decoder_free_ns, self._dma_free_ns)
            self._decoder_free_ns += DECODE_NS[home.codec]
            self._coming[block] = self._decoder_free_ns + STAGE_NS
        self.figures.num_prefetched += started

    def _serve(self, blocks: list[HeadBlock], moves_ns: float) -> None:
        transfer_ns, decode_ns = moves_ns, 0.0
        seen: set[HeadBlock] = set()
        for block in blocks:
            home = self._home(block)
            is_hit = block in self._staged
            is_free = self.spec.charged and (is_hit or block in seen)
            if not is_free:
                self.figures.read_bytes[home.tier] += _num_bytes(home.codec)
            self.figures.num_hits += is_hit
            if is_hit or block in seen:
                continue
            seen.add(block)
            transfer_ns += self._read_ns(home.tier, home.codec)
            decode_ns += DECODE_NS[home.codec]
        compute_ns = COMPUTE_NS * len(blocks)
        self.figures.num_accesses += len(blocks)
        self.figures.exposed_ns += max(0.0, transfer_ns - compute_ns)
        self.figures.decompression_ns += max(compute_ns, transfer_ns + decode_ns) - max(
            compute_ns, transfer_ns
        )
        self._now_ns += max(compute_ns, transfer_ns + decode_ns)

    def _read_ns(self, tier: TierName, codec: CodecName) -> float:
        _, bandwidth, latency_ns = TIERS[tier]
        bits = 8 if self.spec.unit == "gbit" else 1
        return latency_ns + _num_bytes(codec) * bits / bandwidth


def _num_bytes(codec: CodecName) -> int:
    return BLOCK_BYTES // SHRINK[codec]


def published_runs() -> Iterator[tuple[str, PublishedSpec]]:
    """Yield the runs worth a row: the two published ones, and the same with a quirk changed."""
    yield "baseline", PublishedSpec(is_tiered=False)
    yield "kvflow", PublishedSpec()
    yield "kvflow, cold kept in HBM", PublishedSpec(cold_tier="hbm")
    yield "baseline, charged", PublishedSpec(is_tiered=False, charged=True)
    yield "kvflow, charged", PublishedSpec(charged=True)
    yield "kvflow, cold kept in HBM, charged", PublishedSpec(cold_tier="hbm", charged=True)
    yield "baseline, GB/s", PublishedSpec(is_tiered=False, unit="gbyte")
    yield "kvflow, GB/s", PublishedSpec(unit="gbyte")
