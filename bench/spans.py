"""In how many pieces does a hand-off cross? Ours against a plain free list of single blocks.

A trace's prompts are prefilled, handed off, decoded and finished in two pools that are full to 70,
85 and 95 % with blocks that requests hold (the rest is prefix cache). Counted are the spans of each
hand-off, that is the copies that it takes after alignment; hand-offs that hit everything have none
and are left out. Allocation is the time in both pools for one hand-off, prefix look-up and eviction
included. Fragmentation is the share of blocks that may be written and lie outside the longest run.

    python bench/spans.py [--trace MOONCAKE_JSONL] [--quick] [--pool BLOCKS] [--scale N]
                          [--defragment MOVES] [--output FILE]

With --defragment ours runs with and without the background defragmenter instead, which may move so
many cached blocks of each pool while one token is decoded; at lower occupancies too, since it has
to do with what is cached and not with what is held. `evicting` may also write over spare blocks.

Without --trace the workload is a seeded synthetic one of the same kind: lengths, turns, prefixes.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from churn import Churn, Figures, FreeList, Ours
from churn_jobs import Job, jobs, mooncake, synthetic
from load import percentile
from report import Report

BLOCK_SIZE = 32
OCCUPANCIES = (70, 85, 95)
RUNS = 5
LOWER_OCCUPANCIES = (30, 50)
PEER_KEYS = ("spans_p50", "spans_p99", "spans_mean", "allocate_us", "fragmentation")


Makers = dict[str, Callable[[], Ours | FreeList]]


def churn(
    make: Callable[[], Ours | FreeList], work: list[Job], occupancy: int, run: int, count: int
) -> Figures:
    """Return one run: `count` hand-offs from another part of the workload, after a warm-up."""
    pools = Churn(make, occupancy / 100, BLOCK_SIZE)
    largest = pools.prefill.num_blocks // 4
    first = run * len(work) // RUNS
    # A job may come around again under a new id, when the workload is short.
    arrivals = (job for job in work[first:] + work[:first] if pools.blocks_needed(job) <= largest)
    pools.run(arrivals, max(count // 2, 300))
    return pools.run(arrivals, count)


def summary(figures: Figures) -> dict[str, float]:
    """Return the figures of one run by key."""
    spans = [float(n) for n in figures.spans]
    row = {
        "spans_p50": statistics.median(spans),
        "spans_p99": percentile(spans, 0.99),
        "spans_mean": statistics.mean(spans),
        "source_runs_p99": percentile([float(n) for n in figures.source_runs], 0.99),
        "destination_runs_p99": percentile([float(n) for n in figures.destination_runs], 0.99),
        "blocks_mean": statistics.mean(figures.blocks),
        "allocate_us": statistics.median(figures.allocate_us),
        "fragmentation": statistics.mean(figures.fragmentation),
        "occupancy": statistics.mean(figures.occupancy),
        "preempted": float(figures.num_preempted),
    }
    if figures.largest_free:
        row["largest_free"] = statistics.mean(figures.largest_free)
        row["writable_fragmentation"] = statistics.mean(figures.writable_fragmentation)
        row["hit_share"] = figures.hit_share
        row["moved_per_handoff"] = figures.num_moved / figures.num_handed_off
    return row


def makers_of(args: argparse.Namespace) -> Makers:
    """Return what is compared, by the prefix of its figures; the first one has none."""
    makers: Makers = {"": lambda: Ours(args.pool, BLOCK_SIZE)}
    if args.defragment:
        moves = args.defragment
        makers["defragmented_"] = lambda: Ours(args.pool, BLOCK_SIZE, moves_per_tick=moves)
        makers["evicting_"] = lambda: Ours(
            args.pool, BLOCK_SIZE, moves_per_tick=moves, may_evict=True
        )
    else:
        makers["freelist_"] = lambda: FreeList(args.pool, BLOCK_SIZE, is_fifo=True)
        makers["stack_"] = lambda: FreeList(args.pool, BLOCK_SIZE, is_fifo=False)
    return makers


def bench(report: Report, args: argparse.Namespace, work: list[Job], count: int) -> None:
    """Run all, in turns, at every occupancy."""
    makers = makers_of(args)
    for occupancy in (*LOWER_OCCUPANCIES, *OCCUPANCIES) if args.defragment else OCCUPANCIES:
        results: dict[str, list[dict[str, float]]] = {name: [] for name in makers}
        for run, (name, make) in itertools.product(range(RUNS), makers.items()):
            results[name].append(summary(churn(make, work, occupancy, run, count)))
        for name, rows in results.items():
            for key in rows[0] if isinstance(makers[name](), Ours) else PEER_KEYS:
                unit = "us" if key == "allocate_us" else ""
                report.add(f"{name}{key}_at_{occupancy}", [row[key] for row in rows], unit)


def report_target(report: Report) -> None:
    """Say whether the target at 85 % was met, and which side broke the others."""
    figures = report.figures
    p50, p99 = figures["spans_p50_at_85"], figures["spans_p99_at_85"]
    verdict = "met" if p50 <= 1 and p99 <= 4 else "missed"
    print(f"  target at 85 % (median 1, p99 at most 4): {verdict}, {p50:.3g} and {p99:.3g}")
    print(
        f"  p99 of the runs of what is pulled: source {figures['source_runs_p99_at_85']:.3g},"
        f" destination {figures['destination_runs_p99_at_85']:.3g}"
    )


def main() -> None:
    """Run what the flags ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trace", help="a Mooncake trace, .jsonl or .jsonl.gz")
    parser.add_argument("--quick", action="store_true", help="within 45 s")
    parser.add_argument("--pool", type=int, default=8192, help="blocks of either pool")
    parser.add_argument("--scale", type=int, default=4, help="divide every length by this")
    parser.add_argument("--defragment", type=int, default=0, metavar="MOVES", help="per token")
    parser.add_argument("--output", help="results file")
    args = parser.parse_args()
    rows = mooncake(args.trace) if args.trace else synthetic()
    settings = {
        "workload": Path(args.trace).name if args.trace else "synthetic, seed 0",
        "requests": len(rows),
        "lengths": f"divided by {args.scale}",
        "pools": f"2 of {args.pool} blocks of {BLOCK_SIZE} tokens",
    }
    name = "spans_defragmented" if args.defragment else "spans"
    report = Report(name, settings=settings)
    work = jobs(rows, scale=args.scale, block_size=BLOCK_SIZE)
    bench(report, args, work, 300 if args.quick else 1500)
    report_target(report)
    report.finish(args.output)


if __name__ == "__main__":
    main()
