"""Digests where the bytes are: taken of a worker's own blocks, and of what a move has landed.

The worker core says of which blocks, and what must come out; this knows the memory. The runtime
calls `digests_of` after a step, on the executor's thread, and a verified move on the mover's.
"""

from collections.abc import Callable, Sequence

from msgspec.structs import replace

from penstock.core.events import Move, MoveDone
from penstock.core.step import Step
from penstock.core.types import Digest
from penstock.transfer.digest import is_corrupt, take_digests
from penstock.transfer.region import Region


def digests_of(step: Step, regions: Sequence[Region]) -> tuple[tuple[Digest, ...], ...]:
    """Return the digests of the blocks that are complete with `step`, per group."""
    groups = zip(regions, step.digests_of, strict=True)
    return tuple(take_digests(region.blocks, block_ids) for region, block_ids in groups)


def no_digests(_step: Step) -> tuple[tuple[Digest, ...], ...]:
    """Take none: offers then carry none, and nothing is compared."""
    return ()


def verified(
    execute: Callable[[Move], MoveDone], regions: Sequence[Region]
) -> Callable[[Move], MoveDone]:
    """Return an `execute` that also compares what landed in `regions` with the digests."""
    pools = [region.blocks for region in regions]

    def execute_and_verify(move: Move) -> MoveDone:
        done = execute(move)
        if done.error is None and is_corrupt(move, pools):
            return replace(done, is_corrupt=True)
        return done

    return execute_and_verify
