"""What a client sees, and what the front costs.

Part 1: Poisson arrivals of mixed lengths over HTTP, the built-in model (or --model), one prefill
and one decode worker against one mixed worker on the same cores: TTFT, TPOT and ITL at p50 and p99,
output tokens per second. Both servers are up at the same time and take turns, so that a drift of
the machine hits both.

Part 2: the front alone: the same HTTP server, controller, messages and worker cores, but an
executor that answers at once. Everything that is left is ours: requests and streamed tokens per
second on all cores together, client included.

    python bench/serve.py [--quick] [--model FOLDER] [--rate REQUESTS_PER_S] [--output FILE]
"""

import argparse
import asyncio
import contextlib
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from load import Answer, Client, percentile
from report import Report

PROMPT_TOKENS = (32, 64, 128, 256, 512, 1024)
OUTPUT_TOKENS = (16, 32, 64, 128)


@contextlib.contextmanager
def server(*flags: str) -> Iterator[int]:
    """Run `penstock serve` on a free loopback port; yield the port when it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "penstock", "serve", *flags, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_ready(port, process)
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def wait_ready(port: int, process: subprocess.Popen[bytes], timeout_s: float = 600) -> None:
    """Return when /health says so.

    Raises: `SystemExit` when the server ends instead, or takes too long.
    """
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise SystemExit("the server did not come up")


def request_body(rng: random.Random, num_prompt: int, num_output: int) -> dict[str, object]:
    """Return a streamed completion of exactly these lengths, with a prompt nobody has seen."""
    return {
        "prompt": [rng.randrange(300, 4000) for _ in range(num_prompt)],
        "max_tokens": num_output,
        "ignore_eos": True,
        "stream": True,
        "temperature": 0,
    }


async def poisson(port: int, rate: float, seconds: float, seed: int) -> tuple[list[Answer], float]:
    """Send requests at random times for a while; return their answers and how long all took."""
    rng = random.Random(seed)
    client = Client("127.0.0.1", port)
    tasks = []
    start_s = time.perf_counter()
    at_s = start_s
    while (at_s := at_s + rng.expovariate(rate)) < start_s + seconds:
        body = request_body(rng, rng.choice(PROMPT_TOKENS), rng.choice(OUTPUT_TOKENS))
        await asyncio.sleep(at_s - time.perf_counter())
        tasks.append(asyncio.create_task(client.complete(body)))
    answers = await asyncio.gather(*tasks)
    client.close()
    return answers, time.perf_counter() - start_s


async def closed_loop(
    port: int, bodies: list[dict[str, object]], concurrency: int
) -> tuple[list[Answer], float]:
    """Keep `concurrency` requests under way until all are answered; return answers and seconds."""
    client = Client("127.0.0.1", port)
    todo = iter(bodies)
    answers: list[Answer] = []

    async def one_after_the_other() -> None:
        for body in todo:
            answer = await client.complete(body)
            answers.append(answer)

    start_s = time.perf_counter()
    await asyncio.gather(*(one_after_the_other() for _ in range(concurrency)))
    client.close()
    return answers, time.perf_counter() - start_s


def summary(answers: list[Answer], seconds: float) -> dict[str, float]:
    """Return the figures of one run; times in milliseconds."""
    bad = [answer.status for answer in answers if not answer.is_complete]
    if bad:
        raise SystemExit(f"{len(bad)} of {len(answers)} requests failed: {bad[:5]}")
    ttft = [answer.ttft_s * 1e3 for answer in answers]
    tpot = [answer.tpot_s * 1e3 for answer in answers]
    itl = [gap * 1e3 for answer in answers for gap in answer.itl_s]
    return {
        "ttft_p50_ms": statistics.median(ttft),
        "ttft_p99_ms": percentile(ttft, 0.99),
        "tpot_p50_ms": statistics.median(tpot),
        "tpot_p99_ms": percentile(tpot, 0.99),
        "itl_p50_ms": statistics.median(itl),
        "itl_p99_ms": percentile(itl, 0.99),
        "output_tokens_per_s": sum(answer.num_tokens for answer in answers) / seconds,
    }


def bench_cluster(report: Report, args: argparse.Namespace, runs: int, seconds: float) -> None:
    """Part 1."""
    model = [args.model] if args.model else []
    results: dict[str, list[dict[str, float]]] = {"pd": [], "mixed": []}
    with (
        server(*model, "--prefill", "1", "--decode", "1") as pd,
        server(*model, "--prefill", "0", "--decode", "0", "--mixed", "1") as mixed,
    ):
        ports = {"pd": pd, "mixed": mixed}
        rng = random.Random(0)
        warm = [request_body(rng, 256, 32) for _ in range(16)]
        capacity = []
        for port in ports.values():
            answers, took_s = asyncio.run(closed_loop(port, warm, 8))
            capacity.append(len(answers) / took_s)
        rate = args.rate or 0.5 * min(capacity)
        print(f"  arrivals: {rate:.1f} requests/s, {runs} runs of {seconds:.0f} s each")
        for run in range(runs):
            for name, port in ports.items():
                answers, took_s = asyncio.run(poisson(port, rate, seconds, run))
                results[name].append(summary(answers, took_s))
    report.add("arrivals_requests_per_s", [rate])
    for key in results["pd"][0]:
        for name, rows in results.items():
            report.add(f"{name}_{key}", [row[key] for row in rows])


def bench_front(report: Report, runs: int, num_requests: int) -> None:
    """Part 2."""
    rng = random.Random(1)
    streamed = [request_body(rng, 32, 20) for _ in range(num_requests)]
    long = [request_body(rng, 32, 200) for _ in range(num_requests // 8)]
    single = [{**body, "stream": False, "max_tokens": 1} for body in streamed]
    with server("--executor", "instant") as port:
        asyncio.run(closed_loop(port, streamed[:200], 32))
        rows: dict[str, list[float]] = {
            "front_requests_per_s": [],
            "front_streamed_requests_per_s": [],
            "front_streamed_tokens_per_s": [],
            "front_streamed_tokens_per_s_long": [],
        }
        for _ in range(runs):
            answers, took_s = asyncio.run(closed_loop(port, single, 64))
            rows["front_requests_per_s"].append(len(answers) / took_s)
            answers, took_s = asyncio.run(closed_loop(port, streamed, 64))
            tokens = sum(answer.num_tokens for answer in answers)
            rows["front_streamed_requests_per_s"].append(len(answers) / took_s)
            rows["front_streamed_tokens_per_s"].append(tokens / took_s)
            answers, took_s = asyncio.run(closed_loop(port, long, 64))
            tokens = sum(answer.num_tokens for answer in answers)
            rows["front_streamed_tokens_per_s_long"].append(tokens / took_s)
    for key, values in rows.items():
        report.add(key, values, "per s")


def main() -> None:
    """Run what the flags ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="within 45 s")
    parser.add_argument("--model", help="a model folder; default: the built-in model")
    parser.add_argument("--rate", type=float, help="requests per second; default: half of capacity")
    parser.add_argument("--only", choices=("cluster", "front"))
    parser.add_argument("--output", help="results file")
    args = parser.parse_args()
    report = Report("serve", settings={"model": args.model or "penstock-tiny"})
    if args.only != "front":
        bench_cluster(report, args, 5, 1.5 if args.quick else 20)
    if args.only != "cluster":
        bench_front(report, 5, 200 if args.quick else 2000)
    report.finish(args.output)


if __name__ == "__main__":
    main()
