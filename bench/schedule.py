"""What does one routing decision cost? Clusters of 10, 100 and 1000 workers with full indexes.

Half of the workers prefill, half decode, eight on a host; all have run steps and pulls, so that
costs are their own.
The prefix index names 100,000 blocks a worker, up to `--names` of them in all (a controller bounds
its index too): prompts of many conversations, whose first blocks all workers share. Requests are
half new conversations and half later turns, of 32 to 4,096 tokens. One decision is all that the
controller does between a request and its workers: names of its blocks as far as they are known,
look-up, choice, prediction, books and explanation. The requests are booked and taken off again, so
the cluster stays as busy as it is.

    python bench/schedule.py [--quick] [--workers N ...] [--names N] [--output FILE]

Peers' routers take 100 to 200 us at 100 workers; targets: p50 50 us at 100, 300 us at 1000.
"""

import argparse
import gc
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from load import percentile
from report import Report

from penstock.control.fleet import Fleet
from penstock.control.policies import POLICIES
from penstock.control.record import RequestRecord
from penstock.control.router import Router
from penstock.core.block import KVGroup, KVLayout, extend_hashes
from penstock.core.config import ControllerConfig
from penstock.core.descriptors import WorkerInfo
from penstock.core.messages import Load, PullSample, StepSample
from penstock.core.request import Request, SamplingParams
from penstock.core.types import BlockHash, RequestId, Role, WorkerId

BLOCK_SIZE = 32
BLOCKS_PER_WORKER = 100_000
WORKERS_PER_HOST = 8
NOW_NS = 1000
RUNS = 5
VOCABULARY = 32_000
STEM_TOKENS = 256


def make_fleet(count: int, config: ControllerConfig, rng: random.Random) -> Fleet:
    """Return a busy cluster of mixed hardware that has reported what its steps and pulls took."""
    layout = KVLayout("m", (KVGroup(tuple(range(32))),), 8, 128, BLOCK_SIZE, "bfloat16")
    fleet = Fleet(config)
    profiles = ("H100/llama3.1-8b/tp1", "A100/llama3.1-8b/tp1", "H20/llama3.1-8b/tp1")
    for number in range(count):
        role = Role.DECODE if number % 2 else Role.PREFILL
        info = WorkerInfo(
            worker_id=WorkerId(f"{role.value}-{number}"),
            role=role,
            epoch=1,
            address="",
            pid=0,
            layout=layout,
            num_blocks=(BLOCKS_PER_WORKER,),
            max_model_len=131_072,
            max_num_seqs=256,
            profile=profiles[number % len(profiles)],
            host=f"host-{number // WORKERS_PER_HOST}",
        )
        worker = fleet.join(info)
        worker.backlog_ns = rng.uniform(0, 2e8)
        worker.free_at_ns = worker.backlog_ns
        worker.num_prefills = 3
        worker.num_decodes = rng.randrange(64)
        worker.context_tokens = worker.kv_tokens = worker.num_decodes * 2000
        fleet.note_load(_report(number, worker.info.worker_id, rng, count))
        fleet.refresh(worker)
    return fleet


def _report(number: int, worker_id: WorkerId, rng: random.Random, count: int) -> Load:
    steps = tuple(
        StepSample(new, new * new, 8, 8000, int(4e6 + new * 15e3 + rng.random() * 1e6))
        for new in (64, 512, 2048)
    )
    near = number // WORKERS_PER_HOST * WORKERS_PER_HOST
    pulls = tuple(
        PullSample(WorkerId(f"prefill-{source}"), n << 20, 1, int(3e5 + (n << 20) / bytes_per_ns))
        for source, bytes_per_ns in ((rng.randrange(count) // 2 * 2, 5), (near, 50))
        for n in (1, 4, 9, 16)
    )
    return Load(
        worker_id=worker_id,
        waiting=0,
        running=8,
        handing_off=0,
        free_blocks=(100,),
        cached_blocks=(100,),
        step_samples=steps,
        pull_samples=pulls,
    )


def make_chats(count: int, rng: random.Random) -> list[tuple[int, ...]]:
    """Return the tokens of conversations, which begin with one of a few system prompts."""
    stems = [tuple(rng.randrange(VOCABULARY) for _ in range(STEM_TOKENS)) for _ in range(4)]
    return [
        rng.choice(stems)
        + tuple(rng.randrange(VOCABULARY) for _ in range(int(2 ** rng.uniform(5, 12))))
        for _ in range(count)
    ]


def fill_index(fleet: Fleet, chats: list[tuple[int, ...]], names: int, rng: random.Random) -> int:
    """Give every worker its share of the conversations, and then of names nobody will ask for."""
    workers = list(fleet)
    for chat in chats:
        hashes: list[BlockHash] = []
        extend_hashes(hashes, chat, BLOCK_SIZE, "")
        stem = hashes[: STEM_TOKENS // BLOCK_SIZE]
        for worker in rng.sample(workers, min(3, len(workers))):
            fleet.index.apply(worker.slot, hashes)
        for worker in workers:
            fleet.index.apply(worker.slot, stem)
    share = min(BLOCKS_PER_WORKER, names // len(workers))
    for worker in workers:
        fleet.index.apply(worker.slot, [BlockHash(rng.randbytes(16)) for _ in range(share)])
    return fleet.index.num_blocks


def make_requests(
    chats: list[tuple[int, ...]], count: int, rng: random.Random
) -> list[RequestRecord]:
    """Return new conversations and later turns of known ones, in turns."""
    records = []
    for number in range(count):
        added = tuple(rng.randrange(VOCABULARY) for _ in range(32))
        tokens = make_chats(1, rng)[0] if number % 2 else rng.choice(chats)[:4000] + added
        request = Request(
            request_id=RequestId(f"r{number}"),
            prompt_token_ids=tokens,
            params=SamplingParams(max_tokens=400, seed=1),
        )
        records.append(RequestRecord(request, NOW_NS))
    return records


def decide(router: Router, records: list[RequestRecord]) -> list[float]:
    """Return the time of each decision in us."""
    times = []
    gc.disable()
    for record in records:
        begin = time.perf_counter_ns()
        chosen = router.choose(record, NOW_NS)
        assert chosen is not None
        router.assign(record, *chosen)
        times.append((time.perf_counter_ns() - begin) / 1e3)
        router.release(record, NOW_NS)
        record.attempts = 0
    gc.enable()
    return times


def bench(report: Report, workers: int, args: argparse.Namespace) -> None:
    """Measure all policies on one cluster, in turns."""
    rng = random.Random(workers)
    fleet = make_fleet(workers, ControllerConfig(), rng)
    chats = make_chats(60 if args.quick else 300, rng)
    names = fill_index(fleet, chats, args.names, rng)
    print(f"  {workers} workers, {names} names in the index")
    records = make_requests(chats, 200 if args.quick else 1000, rng)
    routers = {name: Router(ControllerConfig(policy=name), fleet) for name in POLICIES}
    runs: dict[str, list[list[float]]] = {name: [] for name in routers}
    for _ in range(RUNS):
        for name, router in routers.items():
            runs[name].append(decide(router, records))
    for name, taken in runs.items():
        prefix = "decision" if name == "predicted" else name
        for share, label in ((0.5, "p50"), (0.99, "p99")):
            if share == 0.5 or name == "predicted":
                each = [percentile(run, share) for run in taken]
                report.add(f"{prefix}_{label}_us_{workers}", each, "us")


def main() -> None:
    """Run what the flags ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="within 45 s")
    parser.add_argument("--workers", type=int, nargs="*", default=[10, 100, 1000])
    parser.add_argument("--names", type=int, default=1_000_000, help="in the index, at most")
    parser.add_argument("--output", help="results file")
    args = parser.parse_args()
    if args.quick:
        args.names = min(args.names, 300_000)
    settings = {
        "requests": "half new, half later turns; 32 to 4096 tokens behind a stem of 256",
        "decision": "names, look-up, choice, prediction, books, explanation",
        "index": f"{BLOCKS_PER_WORKER} names a worker, at most {args.names} in all",
    }
    report = Report("schedule", settings=settings)
    for workers in args.workers:
        bench(report, workers, args)
    for workers, target in ((100, 50), (1000, 300)):
        took = report.figures.get(f"decision_p50_us_{workers}")
        if took is not None:
            verdict = "met" if took <= target else "missed"
            print(f"  target at {workers} workers, p50 {target} us: {verdict}, {took:.1f} us")
    report.finish(args.output)


if __name__ == "__main__":
    main()
