"""The same trace makes the same decisions in production and in simulation.

Production here is everything but processes: asyncio, ZeroMQ, threads for steps and copies, pools in
shared memory that are really mapped. Both run the model whose KV is a hash chain, so both also have
to get the tokens right.
"""

import asyncio
import random
from functools import partial
from pathlib import Path

from penstock.control.controller import Controller
from penstock.core.block import KVLayout
from penstock.core.config import ControllerConfig, WorkerConfig
from penstock.core.descriptors import WorkerInfo
from penstock.core.messages import Cancel, Hello, Message, PeerUp, RequestFailed, Submit, Tokens
from penstock.core.node import DecisionLog, Node
from penstock.core.request import Request, SamplingParams
from penstock.core.types import CONTROLLER, FRONT, NS_PER_S, RequestId, Role, WorkerId
from penstock.runtime.clock import LoopClock
from penstock.runtime.executor import ThreadExecutor
from penstock.runtime.messaging import Messenger
from penstock.runtime.transport import LaneTransport
from penstock.sim.executor import VOCAB_SIZE, MakeModel, chain_model, expected_tokens
from penstock.sim.run import ClusterSpec, SimCluster
from penstock.transfer.generation import COUNTER_BYTES, counters
from penstock.transport.mover import BlockMover
from penstock.transport.shm import SharedPool
from penstock.transport.verify import digests_of, verified
from penstock.worker.worker import Worker

# How often an idle worker looks at its pools depends on the time, which differs.
SPEC = ClusterSpec(is_defragmenting=False, num_blocks=(24,), max_num_batched_tokens=48)
IGNORED = ("Load", "BlocksChanged", "PeerUp")
"""Reports depend on how long things take; introductions carry process ids and addresses. Timers are
left out too: leases run out in simulated seconds that a real run of a second never sees.
"""


def make_trace() -> list[Request]:
    """Prompts of one to several chunks, some sharing a prefix; one after the other."""
    rng = random.Random(5)
    stem = tuple(rng.randrange(VOCAB_SIZE) for _ in range(70))
    requests = []
    for number, length in enumerate((1, 5, 16, 17, 40, 90, 33, 120, 2, 64)):
        own = tuple(rng.randrange(VOCAB_SIZE) for _ in range(length))
        requests.append(
            Request(
                request_id=RequestId(f"r{number}"),
                prompt_token_ids=stem + own if number % 3 == 0 else own,
                params=SamplingParams(max_tokens=rng.randint(1, 20), seed=number),
            )
        )
    return requests


def decisions_of(log: DecisionLog) -> list[object]:
    """Return what was decided, without what must differ: times, reports, names of transports."""
    kept: list[object] = []
    for decision in log.decisions():
        assert isinstance(decision, dict)
        message = decision.get("message")
        if isinstance(message, dict) and message["type"] in IGNORED:
            continue
        if decision["type"] == "WakeAt":
            continue
        kept.append(without_transport(decision))
    return kept


def without_transport(value: object) -> object:
    if isinstance(value, dict):
        return {k: without_transport(v) for k, v in value.items() if k != "transport"}
    return [without_transport(v) for v in value] if isinstance(value, list) else value


class RealWorker:
    """A worker core over real ports, on the running loop."""

    def __init__(
        self,
        name: str,
        folder: Path,
        controller_address: str,
        layout: KVLayout = SPEC.layout,
        make_model: MakeModel = chain_model,
    ) -> None:
        config = WorkerConfig(
            worker_id=WorkerId(name),
            role=SPEC.roles[name],
            epoch=1,
            layout=layout,
            num_blocks=SPEC.num_blocks,
            max_model_len=SPEC.max_model_len,
            max_num_seqs=SPEC.max_num_seqs,
            max_num_batched_tokens=SPEC.max_num_batched_tokens,
            is_defragmenting=SPEC.is_defragmenting,
        )
        self.pools = tuple(
            SharedPool(count, size)
            for count, size in zip(SPEC.num_blocks, layout.block_bytes, strict=True)
        )
        self.counters = tuple(SharedPool(count, COUNTER_BYTES) for count in SPEC.num_blocks)
        self.mover = BlockMover(layout, [pool.region for pool in self.pools])
        self.messenger = Messenger(config.worker_id, 1, folder, self.receive)
        regions = [pool.region for pool in self.pools]
        self.executor = ThreadExecutor(
            make_model(layout, tuple(region.blocks for region in regions)),
            digest=partial(digests_of, regions=regions),
        )
        self.transport = LaneTransport(self.messenger, verified(self.mover.execute, regions))
        self.log = DecisionLog()
        self.node = Node(
            Worker(config, tuple(counters(pool.region.blocks) for pool in self.counters)),
            clock=LoopClock(asyncio.get_running_loop()),
            transport=self.transport,
            executor=self.executor,
            log=self.log,
        )
        self.messenger.open()
        self.messenger.connect(CONTROLLER, 0, controller_address)
        self.executor.start()
        info = WorkerInfo(
            worker_id=config.worker_id,
            role=config.role,
            epoch=1,
            address=self.messenger.address,
            pid=0,
            layout=layout,
            num_blocks=config.num_blocks,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            regions=tuple(pool.descriptor for pool in (*self.pools, *self.counters)),
        )
        self.messenger.send(CONTROLLER, Hello(info=info))

    def receive(self, message: Message) -> None:
        if isinstance(message, PeerUp):
            info = message.info
            self.messenger.connect(info.worker_id, info.epoch, info.address)
            self.mover.add_peer(info)
        self.node.deliver(message)

    def close(self) -> None:
        assert self.executor.close(5)
        self.messenger.close()
        for pool in (*self.pools, *self.counters):
            pool.close()


class RealCluster:
    """The controller core over real ports, and its workers; the front is this object."""

    def __init__(self, folder: Path) -> None:
        self.tokens: dict[RequestId, list[int]] = {}
        self.over = asyncio.Event()
        self.joined = asyncio.Event()
        self.log = DecisionLog()
        self.messenger = Messenger(CONTROLLER, 0, folder, self.receive, hears_strangers=True)
        self.node = Node(
            Controller(ControllerConfig()),
            clock=LoopClock(asyncio.get_running_loop()),
            transport=self,
            log=self.log,
        )
        self.messenger.open()

    def receive(self, message: Message) -> None:
        if isinstance(message, Hello):
            info = message.info
            self.messenger.connect(info.worker_id, info.epoch, info.address)
            self.joined.set()
        self.node.deliver(message)

    def send(self, to: WorkerId, message: Message) -> None:
        if to != FRONT:
            self.messenger.send(to, message)
            return
        assert not isinstance(message, RequestFailed), message
        assert isinstance(message, Tokens)
        for output in message.outputs:
            self.tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                self.over.set()

    def submit(self, *_arguments: object) -> None:
        raise AssertionError("the controller moves no blocks")


async def run_for_real(
    folder: Path,
    trace: list[Request],
    layouts: dict[str, KVLayout] | None = None,
    make_model: MakeModel = chain_model,
) -> tuple[dict[str, DecisionLog], dict[RequestId, list[int]]]:
    cluster = RealCluster(folder)
    workers = {}
    for name in SPEC.roles:
        cluster.joined.clear()
        layout = (layouts or {}).get(name, SPEC.layout)
        workers[name] = RealWorker(name, folder, cluster.messenger.address, layout, make_model)
        await asyncio.wait_for(cluster.joined.wait(), 10)
    for request in trace:
        cluster.tokens[request.request_id] = []
        cluster.over.clear()
        cluster.node.deliver(Submit(request=request))
        await asyncio.wait_for(cluster.over.wait(), 10)
    # A cancel of what is over changes nothing, in both worlds.
    cluster.node.deliver(Cancel(request_id=RequestId("r0")))
    for worker in workers.values():
        worker.close()
    cluster.messenger.close()
    logs = {"controller": cluster.log} | {name: w.log for name, w in workers.items()}
    return logs, cluster.tokens


def run_simulated() -> SimCluster:
    cluster = SimCluster(SPEC)
    for number, request in enumerate(make_trace()):
        cluster.submit(request, (number + 1) * NS_PER_S)
    cluster.cancel(RequestId("r0"), 100 * NS_PER_S)
    cluster.run()
    return cluster


def test_the_same_trace_makes_the_same_decisions(tmp_path: Path) -> None:
    logs, tokens = asyncio.run(run_for_real(tmp_path, make_trace()))
    simulated = run_simulated()
    for request in make_trace():
        expected = expected_tokens(request, request.params.max_tokens, ())
        assert tokens[request.request_id] == expected
        assert simulated.outcomes[request.request_id].token_ids == expected
    assert SPEC.roles == {"p0": Role.PREFILL, "d0": Role.DECODE}
    assert decisions_of(logs["controller"]) == decisions_of(simulated.log)
    for name, worker in simulated.workers.items():
        mine = decisions_of(logs[name])
        assert len(mine) > 30
        assert mine == decisions_of(worker.log)
