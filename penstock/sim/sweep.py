"""Which static split serves a load best, how few workers carry it, and what other limits change.

A split says how many workers of each kind of hardware prefill; the rest decode. One simulated run
of each is looked at under several limits, since a fixed split does not depend on them. Called by
the command line and by benchmarks, which say how one cluster is run.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from math import prod

from msgspec import Struct

from penstock.core.types import Role
from penstock.sim.fleet import Member, Pool, describe_fleet, make_fleet, num_gpus
from penstock.sim.observe import Observation
from penstock.sim.summary import Slo, Summary, summarise

Simulate = Callable[[tuple[Member, ...]], Observation]
SPLITS_MAX = 24
"""Above so many possible splits a coarse grid is tried first, and then around its best."""


class Tried(Struct, frozen=True, kw_only=True):
    """One cluster that was run: its figures under the limits asked for, and the share of requests
    within limits so many times as long (`attainment_at[i]` belongs to scale i).
    """

    cluster: str
    gpus: int
    summary: Summary
    attainment_at: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Sweep:
    """Runs clusters and remembers what came of them."""

    simulate: Simulate
    slo: Slo
    scales: tuple[float, ...] = (1.0,)
    sizes: dict[int, list[Tried]] = field(default_factory=dict)
    """What `fewest` has tried: splits of so many workers, best first."""

    def best_split(self, pools: tuple[Pool, ...]) -> list[Tried]:
        """Return the splits of these workers that were tried, best first, all mixed among them."""
        counts = [pool.count for pool in pools]
        tried: dict[tuple[int, ...], Tried] = {}
        mixed = self._try(make_fleet((pool, Role.MIXED, pool.count) for pool in pools))
        stride = _stride(counts)
        splits: Iterable[tuple[int, ...]] = _grid(counts, stride)
        while True:
            for split in splits:
                if split not in tried and _has_both(split, counts):
                    tried[split] = self._try(_fleet_of(pools, split))
            if stride == 1 or not tried:
                break
            stride = max(1, stride // 2)
            best = max(tried, key=lambda split: _merit(tried[split]))
            splits = _around(best, stride)
        return sorted([mixed, *tried.values()], key=_merit, reverse=True)

    def fewest(self, pool: Pool, target: float, scale: int | None = None) -> int | None:
        """Return how few workers have a share of `target` within the limits; None above the pool.

        With `scale` the limits are those of `scales[scale]`. Found by doubling and halving, so it
        is the fewest if more workers are never worse. Sizes tried before are not run again.
        """

        def reaches(count: int) -> bool:
            if count not in self.sizes:
                self.sizes[count] = self.best_split((Pool(pool.hardware, count),))
            tried = self.sizes[count]
            if scale is None:
                return tried[0].summary.slo_attainment >= target
            return best_at_scale(tried, scale).attainment_at[scale] >= target

        low, high = 0, 1
        while not reaches(high):
            if high == pool.count:
                return None
            low, high = high, min(high * 2, pool.count)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if reaches(middle) else (middle, high)
        return high

    def _try(self, members: tuple[Member, ...]) -> Tried:
        seen = self.simulate(members)
        scaled = (
            Slo(ttft_ms=self.slo.ttft_ms * scale, tpot_ms=self.slo.tpot_ms * scale)
            for scale in self.scales
        )
        return Tried(
            cluster=describe_fleet(members),
            gpus=num_gpus(members),
            summary=summarise(seen, self.slo),
            attainment_at=tuple(summarise(seen, slo).slo_attainment for slo in scaled),
        )


def best_at_scale(tried: list[Tried], index: int) -> Tried:
    """Return the cluster with most requests within the limits of the scale at `index`."""
    return max(tried, key=lambda one: one.attainment_at[index])


def _merit(tried: Tried) -> tuple[float, float]:
    """More requests within the limits, and then sooner."""
    summary = tried.summary
    return round(summary.slo_attainment, 4), -summary.ttft_ms.p99 - summary.tpot_ms.p99


def _fleet_of(pools: tuple[Pool, ...], split: tuple[int, ...]) -> tuple[Member, ...]:
    pairs = list(zip(pools, split, strict=True))
    prefill = [(pool, Role.PREFILL, count) for pool, count in pairs]
    decode = [(pool, Role.DECODE, pool.count - count) for pool, count in pairs]
    return make_fleet([*prefill, *decode])


def _has_both(split: tuple[int, ...], counts: list[int]) -> bool:
    is_inside = all(0 <= n <= count for n, count in zip(split, counts, strict=True))
    return is_inside and 0 < sum(split) < sum(counts)


def _stride(counts: list[int]) -> int:
    stride = 1
    while prod(count // stride + 1 for count in counts) > SPLITS_MAX:
        stride *= 2
    return stride


def _grid(counts: list[int], stride: int) -> Iterator[tuple[int, ...]]:
    return product(*(range(0, count + 1, stride) for count in counts))


def _around(split: tuple[int, ...], stride: int) -> Iterator[tuple[int, ...]]:
    return product(*((n - stride, n, n + stride) for n in split))
