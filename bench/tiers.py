"""How soon does a conversation go on that has fallen out of the KV pool, and what do tiers cost?

Return: `penstock serve` with one worker whose pool holds one and a half conversations of 2,048
tokens, and three of them that return in turn, 16 tokens longer: when one does, none of its blocks
are in the pool any more. Time to first token, by the server's own ledger, with a tier in DRAM, on a
CXL expander (emulated where the machine has none), on disk, in DRAM by way of int8 and int4, and
computed again without any tier. The servers are asked in turn, so that what changes meanwhile,
changes for all of them. That the blocks really came from the tier, and none of them wrong, is read
from /metrics. With the built-in model, and with --large a decoder of Qwen3-0.6B's shape with random
weights in its place (as many copies of it at once as there are ways: several GiB of memory, and
some minutes; --ways takes some of them). Random weights say nothing about what a codec costs, so
both lossy ways are admitted whatever they do.

No reuse: the built-in model under prompts that never return. Are as many requests served with tiers
(DRAM, and disk below it) as without? Both servers are asked in turn again. That nothing returns has
to be learnt first, which takes as many blocks as pool and tiers hold: those runs are told apart.

Sessions: conversations that have three times the pool's tokens together go on in turn, several at a
time, with DRAM and disk and without tiers: turns per second, the share of prompt tokens that were
not computed, the share of the time to first token for which computation stood still for blocks out
of tiers, and what came of the blocks that were brought ahead of need.

The disk is read past the page cache where the file system lets it (the server logs nothing of it
otherwise: tmpfs does not). A conversation that returns finds its blocks written: it comes half a
second after the others' answers, as a person would at the earliest.

Return is kept as tiers.json or tiers_large.json, the other two, together "load", as
tiers_load.json.

    python bench/tiers.py [--large] [--only return|load] [--ways dram cxl disk int8 int4]
                          [--threads N] [--folder DISK] [--quick] [--output FILE]
"""

import argparse
import os
import random
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from handoff import ask, fresh, make_model
from prometheus_client.parser import text_string_to_metric_families
from report import Report
from serve import server

NUM_TOKENS = 2048
NUM_NEW = 16
NUM_CONVERSATIONS = 3
BLOCK_SIZE = 32
RUNS = 6
PAUSE_S = 0.5
TARGET_TIMES = 5.0
TARGET_SHARE = 0.98
LOAD_REQUESTS = 32
LEARNING_RUNS = 4
"""In so many runs there are more blocks than pool and tiers hold."""
LOAD_TOKENS = 512
CONCURRENCY = 8
NUM_SESSIONS = 12
SESSION_TOKENS = 2048
SESSION_POOL = 4
"""Sessions that the pool holds: a third of them."""
SESSION_ROUNDS = 5
SESSION_CONCURRENCY = 2
PARTS = ("return", "load")
PEERS = {
    "LMCache 0.5.6": "within vLLM: 'No supported cpu connector found', no hits, 3.1 s a request",
    "vLLM 0.32 OffloadingConnector": "'only supported on CUDA-alike and XPU GPUs'",
    "vLLM 0.32 SimpleCPUOffloadConnector": "'_StreamPlaceholder has no attribute priority_range'",
}
"""What has tiers as well and does not run on a CPU: what it said when it was tried."""
TOKEN_BYTES = {"tiny": 2 * 5 * 4 * 32 * 2, "0.6b": 2 * 28 * 8 * 128 * 2}
"""Keys and values, layers, heads, size of a head, bfloat16."""


def counted(port: int, name: str, **labels: str) -> float:
    """Return the sum of one metric over everything it is told of, or of what has these labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        samples = [sample for family in families for sample in family.samples]
    return sum(
        sample.value
        for sample in samples
        if sample.name == f"penstock:{name}_total" and labels.items() <= sample.labels.items()
    )


def bench(report: Report, name: str, flags: list[str], tiers: dict[str, list[str]]) -> None:
    """Measure one model with each of the tiers, and without."""
    pool = int(1.5 * NUM_TOKENS * TOKEN_BYTES[name])
    common = ["--mixed", "1", "--dtype", "bfloat16", "--kv-cache-memory", str(pool), *flags]
    common += ["--block-size", str(BLOCK_SIZE)]
    with ExitStack() as stack:
        ports = {way: stack.enter_context(server(*common, *more)) for way, more in tiers.items()}
        rng = random.Random(0)
        told = [fresh(rng, NUM_TOKENS) for _ in range(NUM_CONVERSATIONS)]
        for conversation in told:
            for port in ports.values():
                ask(port, conversation)
        before = {way: counted(port, "kv_tier_hits") for way, port in ports.items()}
        ledgers: dict[str, list[dict[str, Any]]] = {way: [] for way in ports}
        for run in range(RUNS):
            time.sleep(PAUSE_S)
            prompt = told[run % NUM_CONVERSATIONS] + fresh(rng, NUM_NEW)
            for way, port in ports.items():
                ledgers[way].append(ask(port, prompt))
        time.sleep(2 * PAUSE_S)
        for way, port in ports.items():
            report_way(report, f"{name}_{way}", ledgers[way])
            if way != "recompute":
                check(port, before[way], f"{name}_{way}")
    report_gain(report, name, list(tiers))


def report_way(report: Report, of: str, ledgers: list[dict[str, Any]]) -> None:
    """Add the figures of one tier."""
    cached = [row["cached_tokens"] for row in ledgers]
    note = f"{min(cached)} of {NUM_TOKENS + NUM_NEW} tokens not computed"
    report.add(f"ttft_ms_{of}", [row["ttft"] * 1e3 for row in ledgers], "ms", note=note)
    is_brought = not of.endswith("recompute")
    assert all((tokens >= NUM_TOKENS) == is_brought for tokens in cached), f"{of}: {cached}"


def check(port: int, hits_before: float, of: str) -> None:
    """Make sure that it was the tier that had the blocks, and that all were right."""
    hits = counted(port, "kv_tier_hits") - hits_before
    wanted = RUNS * NUM_TOKENS // BLOCK_SIZE
    wrong = counted(port, "kv_tier_corrupt") + counted(port, "kv_tier_failed")
    assert hits >= 0.9 * wanted, f"{of}: {hits} of {wanted} blocks came from the tier"
    assert not wrong, f"{of}: {wrong} blocks were wrong"


def report_gain(report: Report, name: str, ways: list[str]) -> None:
    """Say how many times sooner each tier is than computing."""
    recompute_ms = report.figures[f"ttft_ms_{name}_recompute"]
    for way in ways:
        if way == "recompute":
            continue
        times = report.figures[f"times_{name}_{way}"] = (
            recompute_ms / report.figures[f"ttft_ms_{name}_{way}"]
        )
        aim = f", target {TARGET_TIMES:g}x on the 0.6B shape" if way == "dram" else ""
        print(f"  {name}, {way}: {times:.1f}x sooner than computed{aim}")


def bench_no_reuse(report: Report, flags: list[str], tiers: list[str]) -> None:
    """Measure requests per second of prompts nobody has seen, with tiers and without, in turn."""
    pool = 4 * NUM_TOKENS * TOKEN_BYTES["tiny"]
    common = ["--mixed", "1", "--dtype", "bfloat16", "--kv-cache-memory", str(pool), *flags]
    rates: dict[str, list[float]] = {"off": [], "on": []}
    with ExitStack() as stack:
        ports = {
            way: stack.enter_context(server(*common, *more))
            for way, more in (("off", []), ("on", tiers))
        }
        rng = random.Random(1)
        threads = stack.enter_context(ThreadPoolExecutor(CONCURRENCY))
        for _ in range(LEARNING_RUNS + RUNS):
            for way, port in ports.items():
                prompts = [fresh(rng, LOAD_TOKENS) for _ in range(LOAD_REQUESTS)]
                started_s = time.monotonic()
                list(threads.map(partial(ask, port), prompts))
                rates[way].append(LOAD_REQUESTS / (time.monotonic() - started_s))
        written = counted(ports["on"], "kv_tier_offloaded_bytes")
        hits = counted(ports["on"], "kv_tier_hits")
    assert written, "nothing was written: this measures nothing"
    assert not hits, "something was found again"
    for way, runs in rates.items():
        report.add(f"requests_per_s_no_reuse_{way}", runs[LEARNING_RUNS:], "1/s")
    shares = [on / off for on, off in zip(rates["on"], rates["off"], strict=True)]
    note = f"{written:.0f} bytes written in all"
    report.add("throughput_share_no_reuse_learning", shares[:LEARNING_RUNS])
    share = report.add("throughput_share_no_reuse", shares[LEARNING_RUNS:], note=note)
    verdict = "met" if share >= TARGET_SHARE else "missed"
    print(f"  with tiers and no reuse: {share:.3f} of without, target {TARGET_SHARE:g}: {verdict}")


def bench_sessions(report: Report, flags: list[str], tiers: list[str]) -> None:
    """Measure sessions that outgrow the pool three times, with tiers and without, in turn."""
    pool = SESSION_POOL * (SESSION_TOKENS + 256) * TOKEN_BYTES["tiny"]
    common = ["--mixed", "1", "--dtype", "bfloat16", "--kv-cache-memory", str(pool), *flags]
    rates: dict[str, list[float]] = {"off": [], "on": []}
    ledgers: dict[str, list[dict[str, Any]]] = {"off": [], "on": []}
    with ExitStack() as stack:
        ports = {
            way: stack.enter_context(server(*common, *more))
            for way, more in (("off", []), ("on", tiers))
        }
        rng = random.Random(2)
        sessions = [fresh(rng, SESSION_TOKENS) for _ in range(NUM_SESSIONS)]
        threads = stack.enter_context(ThreadPoolExecutor(SESSION_CONCURRENCY))
        for turn in range(SESSION_ROUNDS + 1):
            for way, port in ports.items():
                started_s = time.monotonic()
                answers = list(threads.map(partial(ask, port), sessions))
                if turn:
                    rates[way].append(NUM_SESSIONS / (time.monotonic() - started_s))
                    ledgers[way] += answers
            sessions = [session + fresh(rng, 2 * NUM_NEW) for session in sessions]
        counts = {
            name: counted(ports["on"], "kv_prefetches", outcome=name)
            for name in ("used", "late", "missed", "wasted", "dropped")
        }
        wrong = counted(ports["on"], "kv_tier_corrupt") + counted(ports["on"], "kv_tier_failed")
    assert not wrong, f"{wrong} blocks were wrong"
    for way, runs in rates.items():
        report.add(f"turns_per_s_sessions_{way}", runs, "1/s")
        hits = [row["cached_tokens"] / SESSION_TOKENS for row in ledgers[way]]
        report.add(f"hit_rate_sessions_{way}", [min(1.0, hit) for hit in hits])
    times = [on / off for on, off in zip(rates["on"], rates["off"], strict=True)]
    report.add("throughput_times_sessions", times, note="with tiers, against without")
    exposed = sum(row["exposed"] for row in ledgers["on"]) / sum(r["ttft"] for r in ledgers["on"])
    report.figures["exposed_share_sessions"] = exposed
    print(f"  of the time to first token, {exposed:.1%} was spent waiting for blocks out of tiers")
    for name, count in counts.items():
        report.figures[f"prefetches_{name}_sessions"] = count
    print("  brought ahead of need: " + ", ".join(f"{n:.0f} {name}" for name, n in counts.items()))


def main() -> None:
    """Run what the flags ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--large", action="store_true", help="the shape of Qwen3-0.6B instead")
    parser.add_argument("--only", choices=PARTS, help="one part alone")
    parser.add_argument("--ways", nargs="+", help="of the first part: dram cxl disk int8 int4")
    parser.add_argument("--quick", action="store_true", help="the first part, the built-in model")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each worker")
    parser.add_argument("--folder", help="where the disk tier lies (default: for temporary files)")
    parser.add_argument("--output", help="results file")
    args = parser.parse_args()
    parts = ["return"] if args.quick else [args.only] if args.only else list(PARTS)
    settings: dict[str, object] = {"threads": args.threads, "tokens": NUM_TOKENS}
    if "return" in parts:
        report = Report(
            "tiers_large" if args.large else "tiers", settings=settings | {"not_compared": PEERS}
        )
        bench_return(report, "0.6b" if args.large else "tiny", args)
        report.finish(args.output)
    if "load" in parts:
        report = Report("tiers_load", settings=settings | {"not_compared": PEERS})
        for bench_part in (bench_no_reuse, bench_sessions):
            with tempfile.TemporaryDirectory(dir=args.folder) as disk:
                size = 8 * NUM_TOKENS * TOKEN_BYTES["tiny"]
                tiers = ["--kv-tier", f"dram={size}", "--kv-tier", f"disk={disk},{2 * size}"]
                bench_part(report, ["--threads", str(args.threads)], tiers)
        report.finish(args.output if args.only else None)


def bench_return(report: Report, name: str, args: argparse.Namespace) -> None:
    """Measure one model with all tiers."""
    with tempfile.TemporaryDirectory(dir=args.folder) as disk, ExitStack() as stack:
        flags = ["--threads", str(args.threads)]
        if name != "tiny":
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            make_model(Path(folder))
            flags = [folder, "--load-format", "dummy", *flags]
        size = 2 * NUM_CONVERSATIONS * NUM_TOKENS * TOKEN_BYTES[name]
        ways = {
            "dram": ["--kv-tier", f"dram={size}"],
            "cxl": ["--kv-tier", f"cxl={size}"],
            "disk": ["--kv-tier", f"disk={disk},{size}"],
            "int8": ["--kv-tier", f"dram={size},codec=int8", "--kv-quality", "100%"],
            "int4": ["--kv-tier", f"dram={size},codec=int4", "--kv-quality", "100%"],
        }
        chosen = {way: more for way, more in ways.items() if way in (args.ways or ways)}
        bench(report, name, flags, {"recompute": [], **chosen})


if __name__ == "__main__":
    main()
