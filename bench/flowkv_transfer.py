"""FlowKV's transfer table here: real calls and real copies of a Llama-3.1-8B prompt's KV.

128 KiB a token (32 layers, 8 KV heads of 128, K and V, bf16), prompts of 500 to 10,000 tokens. Both
pools are first filled and churned to 80 % by the workload of `spans.py`; then the prompt is
allocated in both, and its KV is copied between two populated shared memory pools by the routine
that a worker's mover uses, three ways:

    layer-wise   pools as [layer, K or V, block, ...], ids from a free list: a call for each block,
                 layer, K and V (64 a block)
    block-wise   block-major pools, ids from a free list: a call for each block
    aligned      block-major pools, ids from our allocator: a call for each aligned span

A call is one invocation of the copy routine, as a transfer of those systems is one; `gathered` (in
the table: one) is the same pieces in a single native call, which is what our mover does with
whatever spans it gets. Calls are counted over several prompts, with more churn in between.

The published columns are FlowKV's, second hand (arXiv 2504.03775, A100 with NVLink, IPC): another
machine, so only the shape can be compared. There a call costs 33 us on top of its bytes, here the
difference between the two ways to make the same copies, a few us: calls weigh less here.

    python bench/flowkv_transfer.py [--trace MOONCAKE_JSONL] [--quick] [--output FILE]
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from churn import Churn, FreeList, Ours
from churn_jobs import Job, jobs, mooncake, synthetic
from report import Report

from penstock.core.types import RequestId
from penstock.transfer.plan import SpanArray, cut
from penstock.transfer.region import Region
from penstock.transport.shm import SharedPool, copy_spans

LAYERS, KV_HEADS, HEAD_DIM, ITEM_BYTES = 32, 8, 128, 2
TOKEN_BYTES = LAYERS * 2 * KV_HEADS * HEAD_DIM * ITEM_BYTES
POOL_TOKENS = 65_536
OCCUPANCY = 0.8
RUNS = 5
PUBLISHED = {
    500: (0.0678, 0.0044),
    1000: (0.1309, 0.0075),
    4000: (0.5338, 0.0236),
    8000: (1.1173, 0.0447),
    10_000: (1.4121, 0.0555),
}
"""Tokens -> seconds of FlowKV-Layerwise and of FlowKV, one host; published, second hand."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to copy a prompt: `spans` are in pieces of `piece_bytes` of either pool."""

    name: str
    piece_bytes: int
    spans: SpanArray


class Side:
    """One kind of allocator on both sides of a hand-off, in pools that go on churning."""

    def __init__(
        self, make: Callable[[], Ours | FreeList], work: list[Job], block_size: int
    ) -> None:
        self._pools = Churn(make, OCCUPANCY, block_size)
        largest = self._pools.prefill.num_blocks // 8
        self._arrivals = (job for job in work if self._pools.blocks_needed(job) <= largest)
        self._pools.run(self._arrivals, 1500)

    def cross(self, num_tokens: int) -> SpanArray:
        """Churn on, allocate a fresh prompt in both pools and return its spans; then let it go."""
        self._pools.run(self._arrivals, 20)
        job = Job(RequestId(f"prompt-{num_tokens}"), num_tokens + 1, 1, ())
        offered = self._pools.prefill.prefill(job)
        source, destination = self._pools.decode.adopt(job, offered)
        for cache in (self._pools.prefill, self._pools.decode):
            cache.close(job)
        return cut(np.array(source, np.int64), np.array(destination, np.int64))


def single(spans: SpanArray) -> SpanArray:
    """Return the same copies a block each."""
    rows = [(s + i, d + i, 1) for s, d, n in spans.tolist() for i in range(n)]
    return np.array(rows, np.int64)


def by_layer(blocks: SpanArray, num_blocks: int) -> SpanArray:
    """Return the copies of single blocks for every layer's K and V, in layer-major pools."""
    first = np.arange(LAYERS * 2)[:, None, None] * np.array([num_blocks, num_blocks, 0])
    return np.ascontiguousarray((blocks[None] + first).reshape(-1, 3))


def plans(
    ours: Side, peer: Side, num_tokens: int, block_size: int
) -> tuple[list[Plan], dict[str, list[int]]]:
    """Return the three ways as the allocators would have it now, and the calls of several times."""
    block_bytes = block_size * TOKEN_BYTES
    num_blocks = POOL_TOKENS // block_size
    calls: dict[str, list[int]] = {"layerwise": [], "blockwise": [], "aligned": []}
    for _ in range(2 * RUNS + 1):
        blocks, spans = single(peer.cross(num_tokens)), ours.cross(num_tokens)
        calls["layerwise"].append(LAYERS * 2 * len(blocks))
        calls["blockwise"].append(len(blocks))
        calls["aligned"].append(len(spans))
    made = [
        Plan("layerwise", block_bytes // (LAYERS * 2), by_layer(blocks, num_blocks)),
        Plan("blockwise", block_bytes, blocks),
        Plan("aligned", block_bytes, spans),
    ]
    return made, calls


def view(pool: SharedPool, piece_bytes: int) -> Region:
    """Return a pool's memory in pieces of another size."""
    return Region(pool.region.blocks.reshape(-1, piece_bytes))


def milliseconds(plan: Plan, block_size: int) -> tuple[list[float], list[float]]:
    """Copy a plan between pools made for it: a call for each span, and all in one call, in turns.

    The pools are as large as the ids want; memory is taken for the touched pages alone, and all of
    them are touched before the clock runs. The bytes are compared at the end.
    """
    ends = [SharedPool(POOL_TOKENS // block_size, block_size * TOKEN_BYTES) for _ in range(2)]
    source, destination = (view(end, plan.piece_bytes) for end in ends)
    for index, (start, to, count) in enumerate(plan.spans.tolist()):
        source.blocks[start : start + count] = index % 251 + 1
        destination.blocks[to : to + count] = 0
    separate = list(plan.spans[:, None])
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(RUNS):
        for calls, times in zip((separate, [plan.spans]), taken, strict=True):
            start_s = time.perf_counter()
            for spans in calls:
                copy_spans(source, destination, spans)
            times.append((time.perf_counter() - start_s) * 1e3)
    for start, to, count in plan.spans.tolist():
        copied, original = destination.blocks[to : to + count], source.blocks[start : start + count]
        assert np.array_equal(copied, original), f"{plan.name}: {start} is not {to}"
    for end in ends:
        end.close()
    return taken


def bench_row(
    report: Report, ours: Side, peer: Side, num_tokens: int, block_size: int
) -> tuple[str, ...]:
    """Measure one prompt; return its row of the table."""
    of = f"{num_tokens}_by_{block_size}"
    ms: dict[str, list[float]] = {}
    made, counted = plans(ours, peer, num_tokens, block_size)
    calls = {name: report.add(f"calls_{name}_{of}", runs) for name, runs in counted.items()}
    for plan in made:
        ms[plan.name], ms[plan.name + "_gathered"] = milliseconds(plan, block_size)
    for name, times in ms.items():
        report.add(f"{name}_ms_{of}", times, "ms")
    ratios = [slow / fast for slow, fast in zip(ms["layerwise"], ms["aligned"], strict=True)]
    speed_up = report.add(f"speed_up_{of}", ratios)
    num_bytes = num_tokens * TOKEN_BYTES
    rate = report.add(
        f"aligned_gb_per_s_{of}", [num_bytes / t / 1e6 for t in ms["aligned"]], "GB/s"
    )
    per_call = [t / len(made[0].spans) * 1e3 for t in ms["layerwise"]]
    per_call_us = report.add(f"layerwise_us_per_call_{of}", per_call, "us")
    layerwise_s, aligned_s = PUBLISHED[num_tokens]
    published_us = layerwise_s / (LAYERS * 2 * -(-num_tokens // 16)) * 1e6
    layer, layer_one, block, block_one, aligned, _ = map(statistics.median, ms.values())
    return (
        f"{num_tokens:>6} {block_size:>3}",
        f"{calls['layerwise']:>6g} {calls['blockwise']:>5g} {calls['aligned']:>3g}",
        f"{layer:>7.1f} {layer_one:>5.1f} {block:>7.1f} {block_one:>5.1f} {aligned:>7.1f}",
        f"{speed_up:>5.2f}x {per_call_us:>6.2f} {rate:>6.2f}",
        f"{layerwise_s * 1e3:>7.1f} {aligned_s * 1e3:>5.1f} {layerwise_s / aligned_s:>5.1f}x"
        f" {published_us:>5.1f}",
    )


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Print ours beside what was published."""
    print()
    print(
        "            | here: calls      | ms: a call a piece, or all in one |             us/ ",
        end="",
    )
    print("   | published, second hand")
    print(
        "  tokens by |  layer block aln |   layer (one)   block (one) aligned | speed  call   GB/s",
        end="",
    )
    print(" |   layer FlowKV  speed us/call")
    for row in rows:
        print("  " + " | ".join(row))
    print()


def main() -> None:
    """Run what the flags ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trace", help="a Mooncake trace, .jsonl or .jsonl.gz, for the churn")
    parser.add_argument("--quick", action="store_true", help="within 45 s")
    parser.add_argument("--output", help="results file")
    args = parser.parse_args()
    source = mooncake(args.trace) if args.trace else synthetic()
    name = Path(args.trace).name if args.trace else "synthetic, seed 0"
    settings: dict[str, object] = {
        "churn": f"{name}, lengths divided by 16, 80 % held",
        "pools": "2 of 8 GiB",
    }
    report = Report("flowkv_transfer", settings=settings)
    rows = []
    sizes = (16,) if args.quick else (16, 32)
    tokens = (500, 1000, 4000) if args.quick else tuple(PUBLISHED)
    for block_size in sizes:
        num_blocks = POOL_TOKENS // block_size
        work = jobs(source, scale=16, block_size=block_size)
        ours = Side(partial(Ours, num_blocks, block_size), work, block_size)
        make_peer = partial(FreeList, num_blocks, block_size, is_fifo=True)
        peer = Side(make_peer, work, block_size)
        rows += [bench_row(report, ours, peer, count, block_size) for count in tokens]
    print_table(rows)
    report.finish(args.output)


if __name__ == "__main__":
    main()
