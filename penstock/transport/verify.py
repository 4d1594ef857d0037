"""Digests where the bytes are: taken of a worker's own blocks, and of what a move has landed.

The worker core says of which blocks, and what must come out; this knows the memory. The runtime
calls `digests_of` after a step, on the executor's thread, and a verified move on the mover's.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from msgspec.structs import replace

from penstock.core.events import Move, MoveDone
from penstock.core.step import Step
from penstock.core.types import Digest
from penstock.transfer.digest import TakeDigests, is_corrupt_by, take_digests
from penstock.transfer.region import Region


def digests_of(step: Step, regions: Sequence[Region]) -> tuple[tuple[Digest, ...], ...]:
    """Return the digests of the blocks that are complete with `step`, per group."""
    return digests_by(step, of_host(regions))


def digests_by(step: Step, takes: Sequence[TakeDigests]) -> tuple[tuple[Digest, ...], ...]:
    """Return the same of pools that are not the interpreter's to read, per group."""
    groups = zip(takes, step.digests_of, strict=True)
    return tuple(take(tuple(block_ids)) for take, block_ids in groups)


def no_digests(_step: Step) -> tuple[tuple[Digest, ...], ...]:
    """Take none: offers then carry none, and nothing is compared."""
    return ()


def verified(
    execute: Callable[[Move], MoveDone], regions: Sequence[Region]
) -> Callable[[Move], MoveDone]:
    """Return an `execute` that also compares what landed in `regions` with the digests."""
    return verified_by(execute, of_host(regions))


def of_host(regions: Sequence[Region]) -> tuple[TakeDigests, ...]:
    """Return what takes the digests of pools in the host's memory."""
    return tuple(partial(take_digests, region.blocks) for region in regions)


def verified_by(
    execute: Callable[[Move], MoveDone], takes: Iterable[TakeDigests]
) -> Callable[[Move], MoveDone]:
    """Return the same of pools that are not the interpreter's to read."""
    takes = tuple(takes)

    def execute_and_verify(move: Move) -> MoveDone:
        done = execute(move)
        # What has digests of its own was compared on the way, before it was decoded or cut.
        if done.error is None and not done.digests and is_corrupt_by(move, takes):
            return replace(done, is_corrupt=True)
        return done

    return execute_and_verify
