"""What it costs when two pools have different shapes, beside a copy between equal ones.

64 MiB of KV of 1,024 tokens (16 layers, 8 KV heads of 128, bf16), in blocks at random places, are
pulled through the public `Agent` into a pool of other block size, dtype or share of the heads: read
raw, digests verified, cut and rounded. In the same turns a memcpy of as many bytes, and pulls
between pools of the same shape, verified or not. Rates are bytes of the tokens wanted, as the peer
stores them, per second. What lands is compared with what was sent, element by element.

    python bench/reshape.py [--quick] [--output FILE]
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from msgspec.structs import replace
from report import Report

from penstock.core.block import KVGroup, KVLayout
from penstock.core.events import Reshape
from penstock.core.messages import GroupBlocks
from penstock.core.types import BlockId
from penstock.transfer.digest import take_digests
from penstock.transfer.region import Region
from penstock.transfer.reshape import convert, plan_reshape
from penstock.transport import Agent

NUM_TOKENS = 1024
NUM_LAYERS = 16
BASE = KVLayout("bench", (KVGroup(tuple(range(NUM_LAYERS))),), 8, 128, 32, "bfloat16", 0, 8)
POOL_TOKENS = 2 * NUM_TOKENS
KEY = bytes(range(32))
GIB = 1 << 30
PLANNED_BLOCKS = 10_000

# Shapes of the peers that are pulled from, one after the other, and ours.
CASES: dict[str, tuple[list[KVLayout], KVLayout]] = {
    "equal": ([BASE], BASE),
    "block_16_to_64": ([replace(BASE, block_size=16)], replace(BASE, block_size=64)),
    "block_64_to_16": ([replace(BASE, block_size=64)], replace(BASE, block_size=16)),
    "bf16_to_fp32": ([BASE], replace(BASE, dtype="float32")),
    "fp32_to_bf16": ([replace(BASE, dtype="float32")], BASE),
    "fp16_to_bf16": ([replace(BASE, dtype="float16")], BASE),
    "tp4_to_tp1": (
        [replace(BASE, num_kv_heads=2, first_kv_head=2 * rank) for rank in range(4)],
        BASE,
    ),
    "tp1_to_tp4": ([BASE], replace(BASE, num_kv_heads=2, first_kv_head=2)),
}
STORED = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}


@dataclass(frozen=True)
class Side:
    """A KV pool of an agent, and where the tokens lie in it."""

    agent: Agent
    region: Region
    layout: KVLayout
    blocks: GroupBlocks

    def values(self) -> "np.ndarray":
        """Return a copy of the tokens in order, [tokens, layers * 2, heads, head_dim]."""
        layout = self.layout
        shape = (-1, 2 * NUM_LAYERS, layout.block_size, layout.num_kv_heads, layout.head_dim)
        pool = self.region.blocks.view(STORED[layout.dtype]).reshape(shape)
        taken = pool[list(self.blocks.block_ids)].transpose(0, 2, 1, 3, 4)
        return taken.reshape(-1, *taken.shape[2:])


class Pair:
    """One case over one transport: our agent, and those it pulls from."""

    def __init__(self, stack: ExitStack, transport: str, name: str, *, has_digests: bool) -> None:
        theirs, ours = CASES[name]
        self.taker = make_side(stack, ours, transport, seed=99)
        self.givers = [make_side(stack, layout, "auto", seed=i) for i, layout in enumerate(theirs)]
        self.peers = [self.taker.agent.connect(g.agent.descriptor()) for g in self.givers]
        self.wanted = []
        for giver in self.givers:
            ids = giver.blocks.block_ids
            digests = take_digests(giver.region.blocks, ids) if has_digests else ()
            source = GroupBlocks(0, ids, digests)
            self.wanted.append(Reshape(source, self.taker.blocks, 0, NUM_TOKENS))
        heads = sum(len(shared(giver.layout, ours)) for giver in self.givers)
        one = replace(theirs[0], num_kv_heads=heads, first_kv_head=0)
        self.num_bytes = one.token_bytes * NUM_TOKENS

    def move(self) -> float:
        """Pull everything; return the seconds."""
        started = time.perf_counter()
        for peer, wanted in zip(self.peers, self.wanted, strict=True):
            self.taker.agent.pull_tokens(peer, wanted, self.taker.region)
        return time.perf_counter() - started

    def check(self) -> None:
        """Assert that what lies in our pool is what the peers have."""
        ours = self.taker.layout
        got = self.taker.values()
        for giver in self.givers:
            heads = shared(giver.layout, ours)
            theirs_from, ours_from = giver.layout.first_kv_head, ours.first_kv_head
            sent = giver.values()[:, :, heads.start - theirs_from : heads.stop - theirs_from]
            expected = convert(sent, giver.layout.dtype, ours.dtype)
            landed = got[:, :, heads.start - ours_from : heads.stop - ours_from]
            assert landed.tobytes() == expected.tobytes(), (giver.layout, ours)


def shared(theirs: KVLayout, ours: KVLayout) -> range:
    """Return the heads that both hold."""
    return range(
        max(theirs.first_kv_head, ours.first_kv_head), min(theirs.kv_heads.stop, ours.kv_heads.stop)
    )


def make_side(stack: ExitStack, layout: KVLayout, transport: str, *, seed: int) -> Side:
    """Make an agent with a pool of numbers that every dtype can hold, all pages touched."""
    agent = stack.enter_context(Agent(key=KEY, transport=transport, layout=layout))
    region = agent.allocate(POOL_TOKENS // layout.block_size, layout.block_bytes[0])
    rng = np.random.default_rng(seed)
    whole = rng.integers(-256, 257, region.capacity_bytes // 4).astype(np.float32)
    flat = region.blocks.reshape(-1).view(STORED[layout.dtype])
    flat[:] = np.resize(convert(whole, "float32", layout.dtype), len(flat))
    ids = rng.permutation(region.num_blocks)[: NUM_TOKENS // layout.block_size].tolist()
    return Side(agent, region, layout, GroupBlocks(0, tuple(map(BlockId, ids))))


def memcpy(num_bytes: int) -> Callable[[], float]:
    """Return what copies so many bytes in one piece, with the C library's memcpy."""
    source, destination = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)

    def move() -> float:
        started = time.perf_counter()
        destination[:] = source
        return time.perf_counter() - started

    return move


def measure(report: Report, transport: str, repetitions: int) -> None:
    """Run every case over one transport, in turns with memcpy."""
    with ExitStack() as stack:
        pairs = {name: Pair(stack, transport, name, has_digests=True) for name in CASES}
        pairs["equal_unverified"] = Pair(stack, transport, "equal", has_digests=False)
        for pair in pairs.values():
            pair.move()
            pair.check()
        copy = memcpy(pairs["equal"].num_bytes)
        rates: dict[str, list[float]] = {"memcpy": [], **{name: [] for name in pairs}}
        for _ in range(repetitions):
            rates["memcpy"].append(pairs["equal"].num_bytes / copy() / GIB)
            for name, pair in pairs.items():
                rates[name].append(pair.num_bytes / pair.move() / GIB)
    for name, runs in rates.items():
        report.add(f"{transport}_{name}", runs, "GiB/s")
    equal = report.figures[f"{transport}_equal"]
    for name in CASES:
        if name != "equal":
            share = report.figures[f"{transport}_{name}"] / equal
            report.figures[f"{transport}_{name}_over_equal"] = share


def measure_planning(report: Report, repetitions: int) -> None:
    """Time the plan alone, for ids in no order at all."""
    ids = np.random.default_rng(0).permutation(2 * PLANNED_BLOCKS).tolist()
    ours = replace(BASE, block_size=2 * BASE.block_size)
    wanted = Reshape(
        GroupBlocks(0, tuple(ids[:PLANNED_BLOCKS])),
        GroupBlocks(0, tuple(ids[: PLANNED_BLOCKS // 2])),
        0,
        PLANNED_BLOCKS * BASE.block_size,
    )
    seconds = []
    for _ in range(10 * repetitions):
        started = time.perf_counter()
        plan_reshape(BASE, ours, 0, wanted)
        seconds.append(1000 * (time.perf_counter() - started))
    report.add("plan_10000_blocks_ms", seconds, "ms")


def main() -> None:
    """Run what the flags ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    parser.add_argument("--output", help="results file")
    args = parser.parse_args()
    repetitions = 7 if args.quick else 31
    report = Report("reshape", settings={"moved": f"{NUM_TOKENS} tokens, 64 MiB in bf16"})
    for transport in ("shm", "tcp"):
        measure(report, transport, repetitions)
    measure_planning(report, repetitions)
    over = [v for key, v in report.figures.items() if key.endswith("over_equal")]
    print(f"  reshaping over copying as is, both verified: median {statistics.median(over):.2f}")
    report.finish(args.output)


if __name__ == "__main__":
    main()
