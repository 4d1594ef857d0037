"""Blocks between the GPU's pool and pinned memory of the host: as they are, and encoded on the way.

What a worker does when its pool runs short, and when a prefix comes up again: `DeviceTierMover`,
digests included, from the call until everything has landed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from h200.codecs import make_pool
from h200.device_memory import allocate, double_library, make_driver
from h200.lab import Lab, Measure, Wrong
from penstock.codec.codec import make_codec
from penstock.core.block import KVGroup, KVLayout
from penstock.core.events import Move, MoveClass, Span, TierEnds
from penstock.core.types import BlockHash, BlockId, Digest, RequestId, WorkerId
from penstock.runtime.device_moves import DeviceMoves, device_moves
from penstock.transport.coded import CodedTier
from penstock.transport.device_tiers import DeviceTierMover
from penstock.transport.tier import MemoryTier

NUM_BLOCKS = 128
"""A prompt of 4096 tokens of Llama-3.1-8B: 512 MiB."""


def make_moves(lab: Lab, num_blocks: int) -> tuple[torch.Tensor, DeviceMoves]:
    """Return a pool of random numbers, half of it filled, and what moves its blocks."""
    library = "" if lab.is_cuda else double_library()
    shape = make_pool(lab, 1).shape[1:]
    like = torch.empty(shape, dtype=torch.bfloat16)
    _, blocks = allocate(library, 2 * num_blocks, like.nbytes)
    pool = blocks.view(torch.bfloat16).view(2 * num_blocks, *shape)
    pool[:num_blocks].copy_(lab.normal(num_blocks, *shape))
    moves = device_moves(
        [pool],
        make_driver=lambda: make_driver(library),
        allocate=(lambda n, size: allocate(library, n, size)[1]) if library else None,
    )
    return pool, moves


def make_tier(pool: torch.Tensor, name: str) -> MemoryTier | CodedTier:
    """Return slots for half of the pool, for blocks as they are or by way of a codec."""
    num_slots, (layers, _, block_size, heads, head_dim) = len(pool) // 2, pool.shape[1:]
    if not name:
        return MemoryTier(num_slots, pool[0].nbytes)
    groups = (KVGroup(tuple(range(layers))),)
    codec = make_codec(name, KVLayout("bench", groups, heads, head_dim, block_size, "bfloat16"))
    return CodedTier(MemoryTier(num_slots, codec.encoded_bytes), codec)


def move(ends: TierEnds, source: int, target: int, digests: Sequence[Digest]) -> Move:
    """Return a move of adjacent blocks and slots, a span for every 16 of them."""
    spans = tuple(
        Span(BlockId(source + i), BlockId(target + i), min(16, len(digests) - i))
        for i in range(0, len(digests), 16)
    )
    return Move(
        move_id=1,
        kind=MoveClass.OFFLOAD if ends.destination else MoveClass.ONBOARD,
        request_id=RequestId(""),
        source=WorkerId("w"),
        epoch=1,
        spans=(spans,),
        digests=(tuple(digests),),
        tiers=ends,
    )


def rates(lab: Lab) -> None:
    """Time both ways; raw bytes a second."""
    num_blocks = lab.pick(NUM_BLOCKS, 2)
    pool, moves = make_moves(lab, num_blocks)
    raw_bytes = num_blocks * pool[0].nbytes
    content = moves.takes[0]([BlockId(i) for i in range(num_blocks)])
    names = tuple(BlockHash(i.to_bytes(16, "little")) for i in range(num_blocks))
    for name in ("", "fp8", "int4"):
        tier = make_tier(pool, name)
        mover = DeviceTierMover(
            moves.regions[0],
            {"dram": tier},
            moves.takes[0],
            moves.make_driver,
            make_codec=moves.make_codec,
        )
        down, up = [], []
        for _ in range(1 + lab.runs):
            started = time.perf_counter()
            done = mover.execute(move(TierEnds("", "dram", names), 0, 0, content))
            down.append(time.perf_counter() - started)
            (stored,) = done.digests
            started = time.perf_counter()
            back = mover.execute(move(TierEnds("dram", ""), 0, num_blocks, stored))
            up.append(time.perf_counter() - started)
            if done.error or back.error or (not name and back.digests != (content,)):
                raise Wrong(f"{name or 'as they are'}: {done.error} {back.error}")
        mover.close()
        key = f"_{name}" if name else ""
        lab.add(f"offload{key}", [raw_bytes / s / 1e9 for s in down[1:]], "GB/s")
        lab.add(f"onboard{key}", [raw_bytes / s / 1e9 for s in up[1:]], "GB/s")


CHECKS: tuple[Measure, ...] = ()
MEASURES = (Measure("offload and onboard", rates),)
