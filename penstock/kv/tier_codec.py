"""Which codec the blocks of each tier are kept in: the one that brings them back soonest.

Pure arithmetic over what was measured: the tier's rate, the codec's, and what it does to the model.
Called where a model is loaded, by `runtime/codecs.py`.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from penstock.kv.tiers import CodecSpec

NS_PER_S: Final = 1_000_000_000


class TierWay(NamedTuple):
    """How blocks come out of a tier. `is_memory`: a lossy codec, whose slots all have one size,
    decodes out of the slots themselves, and the copy is part of that.
    """

    bytes_per_s: int
    is_memory: bool


def read_ns(codec: CodecSpec, way: TierWay) -> float:
    """Return what it takes to get one block back: copied, then decoded, by one thread."""
    if way.is_memory and codec.loss:
        return float(codec.decode_ns)
    return codec.block_bytes * NS_PER_S / way.bytes_per_s + codec.decode_ns


def choose_tier_codecs(
    ways: Sequence[TierWay], asked: Sequence[CodecSpec | None], codecs: Sequence[CodecSpec]
) -> list[CodecSpec]:
    """Return a codec for each tier: the one asked for, else of `codecs` the one that is quickest.

    `codecs` are those within the budget, and one at least without a loss. At most one lossy codec
    is used, whatever the number of tiers: a block that sinks from tier to tier would otherwise lose
    more than was measured for either. Of equally quick ones the smaller is taken.
    """
    fixed = {codec.name: codec for codec in asked if codec is not None and codec.loss}
    assert len(fixed) < 2, sorted(fixed)
    exact = [codec for codec in codecs if not codec.loss]
    assert exact, [codec.name for codec in codecs]
    lossy = list(fixed.values()) or [codec for codec in codecs if codec.loss]

    def choose(allowed: Sequence[CodecSpec]) -> list[CodecSpec]:
        return [
            wanted or min(allowed, key=lambda c: (read_ns(c, way), c.block_bytes))
            for wanted, way in zip(asked, ways, strict=True)
        ]

    candidates = [choose(exact), *(choose([*exact, codec]) for codec in lossy)]
    return min(
        candidates,
        key=lambda chosen: sum(read_ns(c, w) for c, w in zip(chosen, ways, strict=True)),
    )
