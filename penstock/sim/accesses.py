"""What computation reads, step by step: KVFlow's workload, made-up tenants, or a recorded file.

A *unit* is what becomes known at once: a step of KVFlow's, a layer of a step elsewhere, since what
a layer reads follows from its own query. `hints` are what a prefetcher may guess of a unit while
the one before runs: KVFlow's is told the truth; elsewhere it is what the same layer and group read
one step earlier.

Real decode traces are not published, as far as we know. `tenants` follows published statistics:
which heads need the whole context (a table of scores, as DuoAttention publishes), the share of
blocks that they select, and how much of a selection is that of the step before (0.35 to 0.5 for
DeepSeek-V3.2's top 2048). `read_accesses` takes what an engine recorded, in JSON lines:

    {"block_bytes": 65536, "compute_ns": 180}                        optional, first
    {"step": 0, "layer": 0, "group": 3, "request": "a", "blocks": [0, 63, 62, 61], "mass": [...]}

`step` and `blocks` (numbers within the sequence) are needed; layer and group are 0 and request is
"" where they are left out. Lines are in the order of computation. `mass` is the share of the
attention that each block got. `penstock serve --record-kv-access` writes such files
(`penstock/engine/kv_access.py`).
"""

import gzip
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import msgspec

from penstock.core.errors import BadRequest
from penstock.sim import kvflow

SINK_BLOCKS = 1
RECENT_BLOCKS = 2
RETRIEVAL_SHARE = 0.5
"""The heads of highest score need the whole context, the others sink and window. Scores themselves
are no threshold: 234 of the 256 of Llama-3.1-8B are above one half.
Source: Xiao et al., DuoAttention, arXiv 2410.10819: half of the KV heads with grouped queries.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accesses:
    """A workload for the memory machine. Blocks are numbers; neighbours in number are adjacent.

    `recency[i]` ranks `blocks[i]`, every block there is: the higher, the later it was written.
    `lossy` are the blocks that may be stored with a loss where a quality budget allows it.
    """

    name: str
    units: Sequence[Sequence[int]]
    hints: Sequence[Sequence[int]]
    blocks: Sequence[int]
    recency: Sequence[int]
    lossy: frozenset[int]
    block_bytes: int
    compute_ns: int
    details: dict[str, str] = field(default_factory=dict)

    @property
    def num_accesses(self) -> int:
        """How many blocks are read, repeated ones included."""
        return sum(map(len, self.units))


def published() -> Accesses:
    """Return KVFlow's workload; lossy is what KVFlow stores as int8 before the first step."""
    steps = [
        [block_number(block) for block in kvflow.accesses(step)] for step in range(kvflow.NUM_STEPS)
    ]
    per_group = kvflow.NUM_BLOCKS
    blocks = range(kvflow.NUM_LAYERS * kvflow.NUM_HEADS * per_group)
    lossy = frozenset(n for n in blocks if kvflow.seed_codec(n % per_group) != "raw")
    return Accesses(
        name="KVFlow's",
        units=steps,
        hints=steps,
        blocks=blocks,
        recency=[n % per_group for n in blocks],
        lossy=lossy,
        block_bytes=kvflow.BLOCK_BYTES,
        compute_ns=kvflow.COMPUTE_NS,
        details={"lossy": "blocks that KVFlow itself stores as int8 before the first step"},
    )


def block_number(block: kvflow.HeadBlock) -> int:
    """Return the number of a block of KVFlow's: those of one head lie next to each other."""
    head = block.layer * kvflow.NUM_HEADS + block.head
    return head * kvflow.NUM_BLOCKS + block.position


def read_heads(path: Path) -> list[list[float]]:
    """Return a table of scores, layers x KV heads, from tab-separated text.

    Raises: `BadRequest` when it is none.
    """
    try:
        rows = [[float(x) for x in line.split()] for line in path.read_text().splitlines() if line]
    except (OSError, ValueError) as error:
        raise BadRequest(f"{path} is not a table of head scores: {error}") from error
    if not rows or len({len(row) for row in rows}) != 1:
        raise BadRequest(f"{path}: every layer must have the same number of heads")
    return rows


def tenants(
    heads: Sequence[Sequence[float]],
    *,
    num_tenants: int,
    context_blocks: int,
    num_steps: int,
    retrieval_share: float = RETRIEVAL_SHARE,
    selected_share: float = 0.0625,
    overlap: float = 0.45,
    seed: int = 0,
) -> Accesses:
    """Return a batch of sequences that decode together, a layer of all of them as one unit.

    A retrieval head, one of the `retrieval_share` of highest score, reads sink, window and
    `selected_share` of the context, of which `overlap` is what it read one step before; the rest
    falls by popularity 1/rank, as few blocks draw most of the attention. Other heads read sink and
    window.
    """
    rng = random.Random(seed)
    num_selected = max(1, round(selected_share * context_blocks))
    num_heads = len(heads[0])
    retrieval = _retrieval_heads(heads, retrieval_share)
    always = [*range(SINK_BLOCKS), *range(context_blocks - RECENT_BLOCKS, context_blocks)]
    weights = list(accumulate(1 / rank for rank in range(1, context_blocks + 1)))
    popularity: dict[int, list[int]] = {}
    before: dict[int, list[int]] = {}
    units: list[list[int]] = []
    hints: list[list[int]] = []
    for _ in range(num_steps):
        for layer in range(len(heads)):
            unit: list[int] = []
            hint: list[int] = []
            for tenant in range(num_tenants):
                for head in range(num_heads):
                    group = (tenant * len(heads) + layer) * num_heads + head
                    base = group * context_blocks
                    chosen = set(always)
                    hint += [base + block for block in before.get(group, always)]
                    if (layer, head) in retrieval:
                        order = popularity.setdefault(
                            group, rng.sample(range(context_blocks), context_blocks)
                        )
                        old = before.get(group, [])
                        chosen |= set(rng.sample(old, round(overlap * len(old))))
                        while len(chosen) < num_selected + len(always):
                            chosen.add(rng.choices(order, cum_weights=weights)[0])
                        before[group] = sorted(chosen)
                    unit += [base + block for block in sorted(chosen)]
            units.append(unit)
            hints.append(hint)
    num_blocks = num_tenants * len(heads) * num_heads * context_blocks
    return Accesses(
        name=f"{num_tenants} tenants",
        units=units,
        hints=hints,
        blocks=range(num_blocks),
        recency=[number % context_blocks for number in range(num_blocks)],
        lossy=frozenset(range(num_blocks)),
        block_bytes=kvflow.BLOCK_BYTES,
        compute_ns=kvflow.COMPUTE_NS,
        details={
            "layers x KV heads": f"{len(heads)} x {num_heads}",
            "retrieval heads": str(len(retrieval)),
            "context": f"{context_blocks} blocks of 128 tokens",
            "read by a retrieval head": f"{num_selected} + {len(always)} blocks",
            "kept from the step before": f"{overlap:.0%}",
            "seed": str(seed),
        },
    )


def _retrieval_heads(heads: Sequence[Sequence[float]], share: float) -> set[tuple[int, int]]:
    """Return (layer, head) of the `share` of heads whose score is highest."""
    ranked = sorted(
        (
            (score, -layer, -head)
            for layer, row in enumerate(heads)
            for head, score in enumerate(row)
        ),
        reverse=True,
    )
    return {(-layer, -head) for _, layer, head in ranked[: round(share * len(ranked))]}


class _Line(msgspec.Struct):
    """One line of a recorded file: settings, or accesses."""

    step: int | None = None
    layer: int = 0
    group: int = 0
    request: str = ""
    blocks: list[int] = []
    mass: list[float] = []
    block_bytes: int | None = None
    compute_ns: int | None = None


def read_accesses(path: Path, *, mass: float = 1.0) -> Accesses:
    """Return recorded accesses, from JSON lines, gzipped or not.

    Of what a line attends to only the fewest blocks are read that hold a share `mass` of it; 1 is
    all that was recorded, whether lines say mass or not.
    Raises: `BadRequest` that names the line, when it is not one.
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise BadRequest(f"{path} cannot be read: {error}") from error
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            lines.append(msgspec.json.decode(line, type=_Line))
        except msgspec.MsgspecError as error:
            raise BadRequest(f"{path}, line {number}: {error}") from error
    reads = [line for line in lines if line.step is not None]
    if mass < 1:
        for number, read in enumerate(reads, 1):
            if not read.mass or len(read.mass) != len(read.blocks):
                raise BadRequest(f"{path}, access {number}: there is no mass for every block")
            read.blocks = _heaviest(read.blocks, read.mass, mass)
    if not reads or min(min(line.blocks, default=0) for line in reads) < 0:
        raise BadRequest(f"{path} has no line with step and blocks, or a block below 0")
    sizes = [line.block_bytes for line in lines if line.block_bytes]
    computes = [line.compute_ns for line in lines if line.compute_ns]
    return _recorded(
        path.name,
        reads,
        block_bytes=sizes[0] if sizes else kvflow.BLOCK_BYTES,
        compute_ns=computes[0] if computes else kvflow.COMPUTE_NS,
    )


def _heaviest(blocks: Sequence[int], mass: Sequence[float], share: float) -> list[int]:
    """Return the fewest blocks that hold a share of the mass, in the order of their numbers."""
    ranked = sorted(zip(blocks, mass, strict=True), key=lambda pair: -pair[1])
    wanted, held = share * sum(mass), 0.0
    kept = []
    for block, weight in ranked:
        if held >= wanted:
            break
        kept.append(block)
        held += weight
    return sorted(kept)


def _recorded(name: str, reads: Iterable[_Line], *, block_bytes: int, compute_ns: int) -> Accesses:
    """Number the blocks, cut the lines into units, and guess each from the step before."""
    reads = list(reads)
    per_group = 1 + max(max(line.blocks, default=0) for line in reads)
    groups: dict[tuple[str, int, int], int] = {}
    before: dict[int, list[int]] = {}
    units: list[list[int]] = []
    hints: list[list[int]] = []
    current: tuple[int | None, int] | None = None
    for line in reads:
        group = groups.setdefault((line.request, line.layer, line.group), len(groups))
        numbers = [group * per_group + block for block in line.blocks]
        if (line.step, line.layer) != current:
            current = line.step, line.layer
            units.append([])
            hints.append([])
        units[-1] += numbers
        hints[-1] += before.get(group, [])
        before[group] = numbers
    blocks = sorted({number for unit in units for number in unit})
    return Accesses(
        name=name,
        units=units,
        hints=hints,
        blocks=blocks,
        recency=[number % per_group for number in blocks],
        lossy=frozenset(blocks),
        block_bytes=block_bytes,
        compute_ns=compute_ns,
        details={"recorded": f"{len(reads)} lines, {len(groups)} groups"},
    )


def half_and_half(num_layers: int = 8, num_heads: int = 8) -> list[list[float]]:
    """Return a table in which every second head needs the whole context.

    The share is the published one for a model with grouped queries (Llama-3-8B).
    Source: Xiao et al., DuoAttention, arXiv 2410.10819.
    """
    return [[float((layer + head) % 2) for head in range(num_heads)] for layer in range(num_layers)]
