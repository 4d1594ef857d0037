"""A cluster whose workers read each other's blocks over links that a test can spoil.

Workers say hello to the controller with the address where they serve reads; here that address is
replaced by the one of a `Proxy` before any peer hears of it, as an operator does who puts something
between. Workers, host, sockets and bytes are the real ones. Also what the stories of these tests
have in common: prompts, the tokens they give undisturbed, and what must hold in the end.
"""

import asyncio
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from msgspec.structs import replace

from penstock.cli.cluster import BUILTIN_MODEL
from penstock.core.config import EngineConfig
from penstock.core.descriptors import Endpoint, WorkerInfo
from penstock.core.messages import Hello, Load, Message
from penstock.core.request import SamplingParams
from penstock.core.types import MIB
from penstock.runtime.local import LocalCluster
from penstock.runtime.settings import ClusterSettings, PulseSettings
from tests.cluster.client import Stream, balanced
from tests.faults.proxy import Proxy

LEASE_S = 5.0
DEADLINE_S = 60.0
"""No story may take longer: far above what any of them should, far below a hang."""
VOCAB_SIZE = 4096
NUM_TOKENS = 32
PROBES = 4
PROBE_TOKENS = 40
"""More than a block: a probe is handed off."""

GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, seed=11, ignore_eos=True)
ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=VOCAB_SIZE, temperature=0.0, ignore_eos=True)


class ProxiedCluster(LocalCluster):
    """`links[worker_id]` is in front of what peers read from that worker's present incarnation."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.links: dict[str, Proxy] = {}
        self.all_links: list[Proxy] = []

    def _receive(self, message: Message) -> None:
        if isinstance(message, Hello) and message.info.endpoints:
            (endpoint,) = message.info.endpoints
            link = Proxy(endpoint.address)
            link.open()
            self.links[message.info.worker_id] = link
            self.all_links.append(link)
            endpoints = (Endpoint(endpoint.kind, link.address),)
            message = Hello(info=replace(message.info, endpoints=endpoints))
        super()._receive(message)

    async def stop(self) -> None:
        await super().stop()
        await asyncio.gather(*(link.close() for link in self.all_links))


class Site:
    """A running cluster, and what a story asks of it."""

    def __init__(self, cluster: ProxiedCluster, log: Path) -> None:
        self.cluster = cluster
        self._log = log
        self._expected: dict[tuple[int, SamplingParams], list[int]] = {}
        self._num_salts = 0
        self._killed: dict[str, int] = {}

    @property
    def link(self) -> Proxy:
        """What is in front of the only prefill worker."""
        return self.cluster.links["prefill-0"]

    def start(self, prompt_tokens: int, params: SamplingParams = GREEDY) -> Stream:
        """Send the prompt of that length, which no cache knows."""
        self._num_salts += 1
        return Stream(self.cluster, prompt(prompt_tokens), params, salt=f"salt {self._num_salts}")

    def start_both(self, prompt_tokens: int) -> list[Stream]:
        """Send it twice: greedy and seeded."""
        return [self.start(prompt_tokens, GREEDY), self.start(prompt_tokens, SEEDED)]

    async def undisturbed(self, *lengths: int) -> None:
        """Learn what the prompts of these lengths give while nothing is wrong."""
        for length in lengths:
            for params in (GREEDY, SEEDED):
                stream = self.start(length, params)
                self._expected[length, params] = await stream.tokens()
        assert all(load.pulls_recomputed == 0 for load in self.loads().values())

    def expected(self, prompt_tokens: int, params: SamplingParams) -> list[int]:
        """Return the tokens that a prompt of that length gives undisturbed."""
        return self._expected[prompt_tokens, params]

    async def finish(self, streams: list[Stream]) -> None:
        """Wait for the end of these requests; their tokens are the undisturbed ones."""
        for stream in streams:
            request = stream.request
            expected = self.expected(len(request.prompt_token_ids), request.params)
            assert await stream.tokens() == expected, request.request_id
            assert len(expected) == NUM_TOKENS

    async def settle(self) -> None:
        """Every worker is up, and gives every block back within a lease and a second."""
        await self.until(self.is_complete)
        before = self.loads()
        async with asyncio.timeout(DEADLINE_S):
            # A worker that keeps something for ever says nothing more of itself: make each work,
            # so that what it says last is of now.
            # One that was silent may not be given anything for another moment.
            while not self._is_news(before):
                probes = [self.start(PROBE_TOKENS, ONE_TOKEN) for _ in range(PROBES)]
                for probe in probes:
                    await probe.tokens()
                await asyncio.sleep(0.1)
            await balanced(self.cluster, LEASE_S + 1)

    def _is_news(self, before: dict[str, Load]) -> bool:
        """Tell whether every worker has reported since."""
        return all(load is not before.get(name) for name, load in self.loads().items())

    def is_complete(self) -> bool:
        """Tell whether every worker is up, the ones in place of those killed as well."""
        infos = [worker.info for worker in self.cluster.status().workers]
        is_new = all(info.epoch > self._killed.get(info.worker_id, 0) for info in infos)
        return is_new and len(infos) == self.cluster.settings.num_workers

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for something to be so."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                await asyncio.sleep(0.002)

    def loads(self) -> dict[str, Load]:
        """Return each worker's last report."""
        status = self.cluster.status()
        return {w.info.worker_id: w.load for w in status.workers if w.load is not None}

    def counts(self, worker_id: str = "decode-0") -> tuple[int, int]:
        """Return how many pulls were corrupt, and how many prompts computed again, so far."""
        load = self.loads().get(worker_id)
        return (load.pulls_corrupt, load.pulls_recomputed) if load else (0, 0)

    def info(self, worker_id: str) -> WorkerInfo:
        """Return what a worker's present incarnation has said of itself."""
        workers = self.cluster.status().workers
        return next(w.info for w in workers if w.info.worker_id == worker_id)

    def pid(self, worker_id: str) -> int:
        """Return the process of a worker's present incarnation."""
        return self.info(worker_id).pid

    def kill(self, worker_id: str) -> None:
        """End a worker where it is; `settle` waits for the next incarnation."""
        info = self.info(worker_id)
        self._killed[worker_id] = info.epoch
        os.kill(info.pid, signal.SIGKILL)

    @contextmanager
    def stopped(self, worker_id: str) -> Iterator[None]:
        """Let a worker do nothing meanwhile, while everybody thinks that it is there."""
        pid = self.pid(worker_id)
        os.kill(pid, signal.SIGSTOP)
        deadline = time.monotonic() + DEADLINE_S
        try:
            while not all(map(_is_stopped, Path(f"/proc/{pid}/task").iterdir())):
                assert time.monotonic() < deadline, f"{worker_id} does not stop"
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def log_of(self, worker_id: str) -> Path:
        """Return the file with the decisions of a worker's present incarnation."""
        return self._log.with_name(f"log.{worker_id}.{self.info(worker_id).epoch}")

    def decisions(self, worker_id: str) -> list[dict[str, object]]:
        """Return its events and commands so far, in order."""
        lines = self.log_of(worker_id).read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        return [part for entry in entries for part in (entry["event"], *entry["commands"])]

    def pulls(self, worker_id: str = "decode-0") -> list[dict[str, object]]:
        """Return the pulls that a worker has begun."""
        moves = [part.get("move") for part in self.decisions(worker_id)]
        return [move for move in moves if isinstance(move, dict) and move["kind"] == "handoff"]

    def moves(self, worker_id: str = "decode-0") -> list[dict[str, object]]:
        """Return the pulls of a worker that have ended."""
        begun = {move["move_id"] for move in self.pulls(worker_id)}
        ended = [part for part in self.decisions(worker_id) if part.get("type") == "MoveDone"]
        return [event for event in ended if event["move_id"] in begun]


Tell = Callable[[Callable[[Site], Awaitable[None]]], None]


@contextmanager
def a_site(*, deadline_s: float = DEADLINE_S, **options) -> Iterator[Tell]:
    """Start a cluster for some stories, told one after the other; each has a deadline."""
    engine = {"kv_cache_bytes": 64 * MIB, **options.pop("engine", {})}
    # Who is stopped by a story is not to be counted as dead, however slow the machine.
    pulse = PulseSettings(lost_after_s=DEADLINE_S)
    defaults = {"transport": "tcp", "threads": 1, "max_num_batched_tokens": 64, "pulse": pulse}
    with tempfile.TemporaryDirectory(prefix="pt-") as folder, asyncio.Runner() as runner:
        log = Path(folder, "log")
        settings = ClusterSettings(
            engine=EngineConfig(model=str(BUILTIN_MODEL), dtype="float32", **engine),
            decision_log=str(log),
            **{**defaults, **options},
        )
        cluster = ProxiedCluster.launch(settings, parent=Path(folder))
        site = Site(cluster, log)

        async def tell(story: Callable[[Site], Awaitable[None]]) -> None:
            async with asyncio.timeout(deadline_s):
                await story(site)

        runner.run(cluster.__aenter__())
        try:
            yield lambda story: runner.run(tell(story))
        finally:
            runner.run(cluster.stop())


def _is_stopped(thread: Path) -> bool:
    """Tell whether a thread stands still: the first to hear of it stops the others."""
    return (thread / "stat").read_text().rpartition(")")[2].split()[0] == "T"


def prompt(num_tokens: int) -> list[int]:
    """Return the prompt of that length."""
    rng = random.Random(num_tokens)
    return [rng.randrange(10, VOCAB_SIZE) for _ in range(num_tokens)]
