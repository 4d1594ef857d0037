"""How much of a trace's prefixes could be reused: stack distances, hit rates, what a tier is worth.

A trace is requests with the names of their prefix blocks (`hash_ids`). A block counts as a hit when
it and all before it are there. A request touches its blocks last one first, as a worker lets them
go: then every block's ancestors are younger than it, a prefix is given up from its end, and the
prefix of an LRU stack is at the same time the longest prefix of every capacity.

The orders of eviction are those of the runtime (`penstock/kv/eviction.py`). Belady's, which knows
the future, is the bound: it may also decline to keep a block, so no policy has more hits.
Called by `penstock sim reuse`. Queues are left out: what is told is what a tier saves by itself.
"""

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import accumulate
from pathlib import Path

import msgspec

from penstock.core.errors import BadRequest
from penstock.core.types import NS_PER_MS
from penstock.kv.eviction import make_order
from penstock.kv.policy import fetch_then_recompute
from penstock.kv.tiers import BlockKey
from penstock.sim.profile import StepTimes

Distances = list[list[int | None]]
"""Per request and block: how many different blocks since its last use; None: the first use."""
SIZES = tuple(2**power for power in range(15))
"""What one name may stand for, in tokens."""
POLICIES = ("lru", "arc", "cost", "belady")


@dataclass(frozen=True, slots=True)
class PrefixRequest:
    """A prompt's length, and the names of its full blocks."""

    input_tokens: int
    names: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PrefixTrace:
    """Requests in the order of the file; `block_tokens` is what one name stands for."""

    name: str
    block_tokens: int
    requests: list[PrefixRequest]

    @property
    def num_blocks(self) -> int:
        """How many full blocks all prompts have together."""
        return sum(len(request.names) for request in self.requests)

    @property
    def num_unique(self) -> int:
        """How many of them are different."""
        return len({name for request in self.requests for name in request.names})


class _Row(msgspec.Struct):
    """What of a line is looked at."""

    input_length: int
    hash_ids: list[int]


def read_prefixes(path: Path) -> PrefixTrace:
    """Return a trace in Mooncake's format, JSON lines, gzipped or not.

    Raises: `BadRequest` when it is none.
    """
    try:
        data = path.read_bytes()
        lines = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).splitlines()
    except (OSError, EOFError) as error:
        raise BadRequest(f"{path} cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(msgspec.json.decode(line, type=_Row))
        except msgspec.MsgspecError as error:
            raise BadRequest(
                f"{path}, line {number}: {error}; a line needs input_length and hash_ids"
            ) from error
    rows = [row for row in rows if row.hash_ids]
    if not rows:
        raise BadRequest(f"{path} has no request with hash_ids")
    block_tokens = max(SIZES, key=lambda size: _num_consistent(rows, size))
    requests = [
        PrefixRequest(row.input_length, tuple(row.hash_ids[: row.input_length // block_tokens]))
        for row in rows
    ]
    return PrefixTrace(path.name, block_tokens, requests)


def _num_consistent(rows: list[_Row], size: int) -> int:
    """Count the rows that name as many blocks as `size` makes, a last partial one or not."""
    up = sum(-(-row.input_length // size) == len(row.hash_ids) for row in rows)
    down = sum(row.input_length // size == len(row.hash_ids) for row in rows)
    return max(up, down)


def stack_distances(trace: PrefixTrace) -> Distances:
    """Return, per request and block, how many different blocks were touched since its last use.

    None: never used before. A cache of more blocks than that has it. O(log blocks) each.
    """
    size = trace.num_blocks + 1
    tree = [0] * (size + 1)
    last: dict[int, int] = {}

    def add(at: int, amount: int) -> None:
        while at <= size:
            tree[at] += amount
            at += at & -at

    def count(at: int) -> int:
        total = 0
        while at:
            total += tree[at]
            at -= at & -at
        return total

    out: Distances = []
    now = 0
    for request in trace.requests:
        # All blocks of a request are looked up before any of them is touched.
        out.append([len(last) - count(last[n]) if n in last else None for n in request.names])
        for name in reversed(request.names):
            now += 1
            if name in last:
                add(last[name], -1)
            last[name] = now
            add(now, 1)
    return out


def lru_hits(distances: Sequence[Sequence[int | None]], capacity_blocks: int) -> int:
    """Return the prefix hits of an LRU cache, from the distances alone."""
    return sum(_reach(blocks, capacity_blocks) for blocks in distances)


def _reach(blocks: Sequence[int | None], capacity_blocks: int) -> int:
    """Return how many leading blocks lie within a capacity."""
    for index, distance in enumerate(blocks):
        if distance is None or distance >= capacity_blocks:
            return index
    return len(blocks)


def hits(trace: PrefixTrace, policy: str, capacity_blocks: int) -> int:
    """Return the prefix hits of a cache under one of `POLICIES`; blocks, for Belady's bound."""
    if policy == "belady":
        return _belady_hits(trace, capacity_blocks)
    order = make_order(policy)
    present: set[BlockKey] = set()
    num_hits = 0
    for request in trace.requests:
        for name in request.names:
            if name not in present:
                break
            num_hits += 1
        for name in reversed(request.names):
            if name in present:
                order.touch(name)
                continue
            if len(present) >= capacity_blocks:
                victim = order.victim(_anything)
                assert victim is not None, "a full cache has a victim"
                order.remove(victim, evicted=True)
                present.remove(victim)
            order.insert(name, 1.0)
            present.add(name)
    return num_hits


def _anything(key: BlockKey) -> bool:
    return True


def _belady_hits(trace: PrefixTrace, capacity_blocks: int) -> int:
    """Return the block hits of the cache that always gives up what is used last again."""
    never = len(trace.requests)
    upcoming: dict[int, int] = {}
    next_use: list[list[int]] = []
    for index in range(len(trace.requests) - 1, -1, -1):
        names = trace.requests[index].names
        next_use.append([upcoming.get(name, never) for name in names])
        upcoming.update(dict.fromkeys(names, index))
    next_use.reverse()
    present: dict[int, int] = {}
    farthest: list[tuple[int, int]] = []
    num_hits = 0
    for request, following in zip(trace.requests, next_use, strict=True):
        num_hits += sum(name in present for name in request.names)
        for name, use in zip(request.names, following, strict=True):
            if use == never:
                present.pop(name, None)
                continue
            present[name] = use
            heappush(farthest, (-use, name))
        # Only now: a block of this request that is not used again makes room by itself.
        while len(present) > capacity_blocks:
            minus_use, victim = heappop(farthest)
            if present.get(victim) == -minus_use:
                del present[victim]
    return num_hits


# ---------------------------------------------------------------------------------- tiers


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseTier:
    """A tier under the stack: how many blocks it holds and what reading it costs."""

    name: str
    capacity_blocks: int
    bytes_per_ns: float
    latency_ns: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TierValue:
    """What came of a set of tiers: the mean and the percentiles of TTFT, in ms, without queues."""

    mean_ms: float
    p50_ms: float
    p90_ms: float
    hit_rate: float
    num_parted: int
    """Requests for which part was fetched and part recomputed."""


def tier_value(
    trace: PrefixTrace,
    distances: Sequence[Sequence[int | None]],
    tiers: Sequence[ReuseTier],
    *,
    times: StepTimes,
    block_bytes: int,
) -> TierValue:
    """Return TTFT when blocks sink from tier to tier in the order of an LRU stack.

    The first tier is read where it lies. From the others blocks are fetched as far as that is
    sooner than computing them, by the workers' own `fetch_then_recompute`; links work side by side.
    """
    bounds = list(accumulate(tier.capacity_blocks for tier in tiers))
    ttfts, num_hits, num_parted = [], 0, 0
    for request, blocks in zip(trace.requests, distances, strict=True):
        ends = [_reach(blocks, bound) for bound in bounds]
        local, total = (ends[0], ends[-1]) if ends else (0, 0)
        num_hits += total
        tokens = trace.block_tokens

        def compute_ns(first: int, new: int) -> float:
            quadratic = new * new + 2 * new * first
            return (times.b * new + times.c * quadratic) * NS_PER_MS

        def recompute_ns(num_blocks: int, total: int = total, tokens: int = tokens) -> float:
            return compute_ns((total - num_blocks) * tokens, num_blocks * tokens)

        def fetch_ns(num_blocks: int, ends: list[int] = ends, local: int = local) -> float:
            """Fetch so many blocks after what is local, each from the tier that has it."""
            slowest = 0.0
            for tier, begin, end in zip(tiers[1:], ends, ends[1:], strict=False):
                count = min(end, local + num_blocks) - begin
                if count > 0:
                    took_ns = tier.latency_ns + count * block_bytes / tier.bytes_per_ns
                    slowest = max(slowest, took_ns)
            return slowest

        stretches = [end - local for end in ends[1:-1]]
        cut = fetch_then_recompute(total - local, fetch_ns, recompute_ns, ends=stretches)
        num_parted += 0 < cut.num_fetched < total - local
        # Every prompt computes its last token at least.
        rest = max(1, request.input_tokens - total * tokens)
        rest_ns = compute_ns(request.input_tokens - rest, rest)
        ttfts.append(times.a + (cut.total_ns + rest_ns) / NS_PER_MS)
    ttfts.sort()
    return TierValue(
        mean_ms=sum(ttfts) / len(ttfts),
        p50_ms=ttfts[len(ttfts) // 2],
        p90_ms=ttfts[len(ttfts) * 9 // 10],
        hit_rate=num_hits / max(1, trace.num_blocks),
        num_parted=num_parted,
    )
