"""Decisions about blocks as pure functions over costs: codec, fetch or recompute, where to keep.

No state, no constants that stand for a machine: every cost comes in as predicted at this moment.
Called by `kv/orchestrator.py`, a worker's desks, and who wants to know beforehand (a study).
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import NamedTuple

from penstock.kv.tiers import CodecSpec, LinkSpec, Tier


class Temperature(Enum):
    """What keeping a block is worth, by its expected uses: the word that is shown and that decides
    what is written where.
    """

    HOT = "hot"
    """Written to the nearest tier at once: it will be wanted, and evicting it costs nothing."""
    WARM = "warm"
    """Written to the nearest tier when it has to go."""
    COLD = "cold"
    """It takes nobody's place: to the farthest tier where writing costs nobody anything, else it
    is dropped, since computing it again is cheaper than carrying it.
    """


class Cut(NamedTuple):
    """Fetch so many of the blocks and compute the others: which, and when, says who returns it."""

    num_fetched: int
    total_ns: float


class Option(NamedTuple):
    """A tier in which a block could be kept: what reading it there costs, and what writing does."""

    tier: Tier
    fetch_ns: float
    write_ns: float
    free_bytes: int


def steady_ns(
    codec: CodecSpec, link: LinkSpec, num_lanes: int, blocks_per_descriptor: float
) -> float:
    """Return the time per block of a long stream: the slower of the link and the decoder.

    They work beside each other. A descriptor's latency is shared by the blocks that ride in it.
    """
    latency_ns = link.latency_ns / link.num_queues / blocks_per_descriptor
    return max(link.bytes_ns(codec.block_bytes) + latency_ns, codec.decode_ns / num_lanes)


def choose_codec(
    codecs: Sequence[CodecSpec],
    link: LinkSpec,
    *,
    loss_max: float,
    num_lanes: int = 1,
    blocks_per_descriptor: float = 1.0,
) -> CodecSpec:
    """Return the codec that streams fastest over a link within the quality budget.

    Where two are equally fast, the one of fewer bytes, then of less loss.
    Raises: `ValueError` when no codec is within the budget; a lossless one always is.
    """
    allowed = [codec for codec in codecs if codec.loss <= loss_max]
    if not allowed:
        raise ValueError(f"no codec within a loss of {loss_max}")
    return min(
        allowed,
        key=lambda c: (steady_ns(c, link, num_lanes, blocks_per_descriptor), c.block_bytes, c.loss),
    )


def fetch_then_recompute(
    num_blocks: int,
    fetch_ns: Callable[[int], float],
    recompute_ns: Callable[[int], float],
    *,
    ends: Sequence[int] = (),
) -> Cut:
    """Return how many blocks to fetch from the front before the rest is computed after them.

    One after the other: blocks are computed from the prefix before them. Nothing is
    fetched, or all, or one of `ends`, where what a block costs to fetch changes; of two that take
    the same, the one that fetches less.
    """
    cuts = (
        Cut(
            n, (fetch_ns(n) if n else 0.0) + (recompute_ns(num_blocks - n) if n < num_blocks else 0)
        )
        for n in sorted({0, *ends, num_blocks})
    )
    return min(cuts, key=lambda cut: cut.total_ns)


def fetch_beside_computing(
    num_blocks: int, fetch_ns: Callable[[int], float], recompute_ns: Callable[[int], float]
) -> Cut:
    """Return how many blocks to fetch from the end while those before them are computed.

    Both begin now and meet where they take the same. O(log blocks) predictions.
    """

    def meet(num_fetched: int) -> Cut:
        computing_ns = recompute_ns(num_blocks - num_fetched) if num_fetched < num_blocks else 0.0
        return Cut(num_fetched, max(fetch_ns(num_fetched) if num_fetched else 0.0, computing_ns))

    # The fewest that are computed while the others come, and one less.
    num_computed = bisect_left(
        range(num_blocks), True, key=lambda n: n > 0 and recompute_ns(n) >= fetch_ns(num_blocks - n)
    )
    cuts = (meet(num_blocks - n) for n in {max(0, num_computed - 1), num_computed})
    return min(cuts, key=lambda cut: cut.total_ns)


def temperature_of(expected_uses: float, *, save_ns: float, write_ns: float) -> Temperature:
    """Return how warm a block is: each expected use saves this, writing it below costs that.

    Hot from twice the cost on, so that eviction is free; cold where it does not pay.
    """
    gain_ns = expected_uses * save_ns
    if gain_ns >= 2 * write_ns and gain_ns > 0:
        return Temperature.HOT
    return Temperature.WARM if gain_ns > write_ns else Temperature.COLD


def choose_tier(
    options: Iterable[Option], *, recompute_ns: float, expected_uses: float, num_bytes: int
) -> Tier | None:
    """Return where to keep a block that a faster tier gives up; None to drop it.

    The tier of the largest gain: uses times what fetching saves over computing, less the writing.
    """
    best, best_gain_ns = None, 0.0
    for option in options:
        gain_ns = expected_uses * (recompute_ns - option.fetch_ns) - option.write_ns
        if option.free_bytes >= num_bytes and gain_ns > best_gain_ns:
            best, best_gain_ns = option.tier, gain_ns
    return best
