"""`penstock sim reuse TRACE`: how much of a trace could be reused, and what each tier is worth.

`add_reuse` is called when the command line is read, so nothing heavy is imported before `reuse`
runs.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.cli.sim_arguments import Commands
    from penstock.sim.profile import Hardware
    from penstock.sim.reuse import Distances, PrefixTrace, ReuseTier

_DESCRIPTION = """\
Study the prefixes of a trace: stack distances, hit rates by capacity and policy with Belady's as
the bound, and what each tier is worth in time to first token. Queues are left out.
"""

_EXAMPLES = """\
examples:
  penstock sim reuse mooncake_conversation_trace.jsonl.gz
  penstock sim reuse trace.jsonl --gpu H200 --model llama3.1-70b --dram-gib 1024 --disk-gib 8192
  penstock sim reuse trace.jsonl --capacities 100000,1000000,10000000 --json

A trace is JSON lines with input_length and hash_ids (names of prefix blocks), as Mooncake publishes
them. "cost" counts uses and ages; "belady" knows the future and is the most that any cache can hit.
"""


def add_reuse(acts: "Commands") -> None:
    """Add `penstock sim reuse`."""
    parser = acts.add_parser(
        "reuse",
        help="how much of a trace's prefixes could be reused, and from where",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("trace", metavar="TRACE", help="JSON lines with input_length and hash_ids, gzipped or not")
    add("--model", default="llama3.1-8b", metavar="M", help="llama3.1-8b (default), llama3.1-70b")
    add("--gpu", default="H100", metavar="GPU", help="whose prefill times and room (default H100)")
    add("--dram-gib", type=_size, default=256.0, metavar="N", help="host memory (default 256)")
    add("--dram-gbs", type=_size, default=25.0, metavar="GB/s", help="to read it (default 25)")
    add("--cxl-gib", type=_size, default=512.0, metavar="N", help="CXL memory (default 512)")
    add("--cxl-gbs", type=_size, default=12.0, metavar="GB/s", help="to read it (default 12)")
    add("--disk-gib", type=_size, default=4096.0, metavar="N", help="disk (default 4096)")
    add("--disk-gbs", type=_size, default=5.0, metavar="GB/s", help="to read it (default 5)")
    add(
        "--capacities",
        type=_capacities,
        metavar="T,T",
        help="tokens that a cache holds (default: steps up to all there are)",
    )
    add("--json", action="store_true", help="one JSON object on standard output")


def reuse(options: argparse.Namespace) -> int:
    """Study one trace; return the exit code. Raises: `BadRequest` for a file that is no trace."""
    from penstock.sim.profile import find_hardware
    from penstock.sim.reuse import read_prefixes, stack_distances

    hardware = find_hardware(options.gpu, options.model)
    trace = read_prefixes(Path(options.trace))
    _say(f"{len(trace.requests):,} requests, {trace.num_blocks:,} blocks: stack distances")
    distances = stack_distances(trace)
    record: dict[str, Any] = {
        "trace": trace.name,
        "block_tokens": trace.block_tokens,
        "requests": len(trace.requests),
        "blocks": trace.num_blocks,
        "unique_blocks": trace.num_unique,
        "distances_blocks": _percentiles(
            sorted(d for blocks in distances for d in blocks if d is not None)
        ),
        "hit_rates": _hit_rates(trace, options.capacities),
    }
    _say("what each tier is worth")
    record["tiers"] = _tiers(options, trace, distances, hardware)
    if options.json:
        print(json.dumps(record))
    else:
        _print(record, f"{hardware.model} on {hardware.tp} {hardware.gpu}")
    return 0


def _percentiles(ordered: list[int]) -> dict[str, int]:
    if not ordered:
        return {}
    points = (10, 25, 50, 75, 90, 99)
    return {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in points}


def _hit_rates(trace: "PrefixTrace", tokens: list[int] | None) -> list[dict[str, float]]:
    from penstock.sim.reuse import POLICIES, hits

    if tokens:
        capacities = [max(1, count // trace.block_tokens) for count in tokens]
    else:
        shares = (0.01, 0.03, 0.1, 0.3, 1.0)
        capacities = [max(1, round(share * trace.num_unique)) for share in shares]
    rows = []
    for capacity in capacities:
        _say(f"hit rates of {capacity * trace.block_tokens:,} tokens")
        row: dict[str, float] = {"tokens": capacity * trace.block_tokens}
        for policy in POLICIES:
            row[policy] = hits(trace, policy, capacity) / max(1, trace.num_blocks)
        rows.append(row)
    return rows


def _tiers(
    options: argparse.Namespace, trace: "PrefixTrace", distances: "Distances", hardware: "Hardware"
) -> list[dict[str, Any]]:
    """Return TTFT with more and more tiers, and with the first alone but without bound."""
    from penstock.core.types import GIB
    from penstock.sim.profile import layout_of
    from penstock.sim.reuse import ReuseTier, tier_value

    block_bytes = sum(layout_of(options.model, trace.block_tokens).block_bytes)

    def tier(name: str, gib: float, gbs: float, latency_us: float) -> "ReuseTier":
        return ReuseTier(
            name=name,
            capacity_blocks=int(gib * GIB) // block_bytes,
            bytes_per_ns=gbs,
            latency_ns=latency_us * 1000,
        )

    hbm = ReuseTier(
        name="HBM",
        capacity_blocks=hardware.capacity_tokens // trace.block_tokens,
        bytes_per_ns=1.0,
        latency_ns=0.0,
    )
    unbounded = ReuseTier(
        name="HBM without bound",
        capacity_blocks=trace.num_unique + 1,
        bytes_per_ns=1.0,
        latency_ns=0.0,
    )
    below = [
        tier("DRAM", options.dram_gib, options.dram_gbs, 20),
        tier("CXL", options.cxl_gib, options.cxl_gbs, 20),
        tier("disk", options.disk_gib, options.disk_gbs, 200),
    ]
    chains: list[list[ReuseTier]] = [[], *([hbm, *below[:count]] for count in range(4))]
    chains.append([unbounded])
    rows = []
    for chain in chains:
        value = tier_value(trace, distances, chain, times=hardware.times, block_bytes=block_bytes)
        rows.append(
            {
                "tiers": " + ".join(t.name for t in chain) or "no reuse",
                "tokens": sum(t.capacity_blocks for t in chain) * trace.block_tokens,
                "hit_rate": value.hit_rate,
                "ttft_mean_ms": value.mean_ms,
                "ttft_p50_ms": value.p50_ms,
                "ttft_p90_ms": value.p90_ms,
                "num_parted": value.num_parted,
            }
        )
    return rows


def _print(record: dict[str, Any], hardware: str) -> None:
    print(
        f"{record['trace']}: {record['requests']:,} requests, {record['blocks']:,} full blocks of"
        f" {record['block_tokens']} tokens, {record['unique_blocks']:,} of them different"
    )
    distances = record["distances_blocks"]
    words = ", ".join(f"{name} {value:,}" for name, value in distances.items())
    print(f"  stack distance of what is used again, blocks: {words or 'nothing is used again'}")
    print("\n  prefix hits, share of all full blocks")
    print(f"  {'capacity, tokens':>18}{'LRU':>9}{'ARC-like':>10}{'by cost':>9}{'Belady':>9}")
    for row in record["hit_rates"]:
        print(
            f"  {row['tokens']:>18,}{row['lru']:>9.3f}{row['arc']:>10.3f}{row['cost']:>9.3f}"
            f"{row['belady']:>9.3f}"
        )
    print(f"\n  time to first token without queues, {hardware}")
    print(f"  {'tiers':<28}{'tokens':>14}{'hits':>8}{'mean ms':>10}{'p50':>9}{'p90':>9}")
    for row in record["tiers"]:
        print(
            f"  {row['tiers']:<28}{row['tokens']:>14,}{row['hit_rate']:>8.3f}"
            f"{row['ttft_mean_ms']:>10.1f}{row['ttft_p50_ms']:>9.1f}{row['ttft_p90_ms']:>9.1f}"
        )


def _say(text: str) -> None:
    print(f"penstock sim: {text}", file=sys.stderr, flush=True)


def _size(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")
    return size


def _capacities(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 100000,1000000")
    return [int(part) for part in parts]
