"""`SimCluster`: the production cores composed over simulated ports, with faults on a schedule.

Everything that may differ between two runs comes from the seed and the calls made before `run`; the
same calls give the same decision log. After every event the invariants of all cores are checked.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from penstock.control.controller import Controller
from penstock.core.block import KVLayout
from penstock.core.config import ControllerConfig, Handoff, WorkerConfig
from penstock.core.events import Command, Event, SetRole, WorkerLost
from penstock.core.messages import (
    Cancel,
    Hello,
    Message,
    PeerDown,
    PeerUp,
    RequestFailed,
    Submit,
    TokenOutput,
    Tokens,
)
from penstock.core.node import DecisionLog, Node
from penstock.core.request import Request
from penstock.core.types import CONTROLLER, FRONT, NS_PER_MS, NS_PER_S, RequestId, Role, WorkerId
from penstock.sim.clock import SimClock
from penstock.sim.executor import (
    MakeModel,
    SimExecutor,
    StepCost,
    chain_layout,
    chain_model,
    chain_scores,
)
from penstock.sim.life import MortalClock, introduction
from penstock.sim.network import LinkCost, SimMemory, SimNetwork, SimTransport
from penstock.sim.tiers import SimTier, SimTiers, Slots, make_slots
from penstock.transfer.region import Bytes2D
from penstock.worker.worker import Worker

RESTARTED = "the controller was started anew"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """A cluster to simulate. `num_blocks` is per KV group of each worker.

    `layouts` are those of workers, by name, whose KV lies in another shape than `layout`. `tiers`
    are below the pool of every worker, nearest first.
    """

    roles: dict[str, Role] = field(default_factory=lambda: {"p0": Role.PREFILL, "d0": Role.DECODE})
    layout: KVLayout = field(default_factory=lambda: chain_layout(16))
    layouts: dict[str, KVLayout] = field(default_factory=dict)
    num_blocks: tuple[int, ...] = (64,)
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 64
    max_model_len: int = 512
    eos_token_ids: tuple[int, ...] = ()
    step_cost: StepCost = field(default_factory=StepCost)
    link_cost: LinkCost = field(default_factory=LinkCost)
    model: MakeModel = chain_model
    handoff: Handoff = Handoff.STREAM
    is_defragmenting: bool = True
    max_rounds: int = 1
    has_digests: bool = True
    tiers: tuple[SimTier, ...] = ()
    detection_ns: int = 20 * NS_PER_MS
    respawn_ns: int = 100 * NS_PER_MS
    controller: ControllerConfig = field(default_factory=ControllerConfig)


class SimWorker:
    """A worker core with its simulated ports, pools and life."""

    def __init__(
        self,
        spec: ClusterSpec,
        network: SimNetwork,
        name: str,
        epoch: int,
        before: "SimWorker | None" = None,
    ) -> None:
        layout = spec.layouts.get(name, spec.layout)
        kept = before.slots if before is not None else {}
        self.slots: dict[str, Slots] = make_slots(spec.tiers, layout.block_bytes[0], kept)
        tiers = SimTiers(spec.tiers, self.slots, network.clock, network.rng)
        self.config = WorkerConfig(
            worker_id=WorkerId(name),
            role=spec.roles[name],
            epoch=epoch,
            layout=layout,
            num_blocks=spec.num_blocks,
            max_model_len=spec.max_model_len,
            max_num_seqs=spec.max_num_seqs,
            max_num_batched_tokens=spec.max_num_batched_tokens,
            eos_token_ids=spec.eos_token_ids,
            handoff=spec.handoff,
            is_defragmenting=spec.is_defragmenting,
            max_rounds=spec.max_rounds,
            tiers=tiers.configs(),
        )
        generations = tuple(np.zeros(count, np.int64) for count in spec.num_blocks)
        self.core = Worker(self.config, generations)
        sizes = zip(spec.num_blocks, layout.block_bytes, strict=True)
        self.pools: tuple[Bytes2D, ...] = tuple(np.zeros(size, np.uint8) for size in sizes)
        self.is_alive = True
        self.log = DecisionLog()
        memory = SimMemory(layout, self.pools, generations, tiers)
        transport = SimTransport(network, self.config.worker_id, memory, lambda: self.is_alive)
        model = spec.model(layout, self.pools)
        digested = self.pools if spec.has_digests else ()
        executor = SimExecutor(
            network.clock,
            spec.step_cost,
            model,
            digested,
            block_size=layout.block_size,
            observe=chain_scores(layout, self.pools),
        )
        clock = MortalClock(network.clock, lambda: self.is_alive)
        self._node = Node(
            self.core, clock=clock, transport=transport, executor=executor, log=self.log
        )
        network.join(self.config.worker_id, self.deliver)
        network.register(self.config.worker_id, epoch, memory)
        self._peers: dict[WorkerId, int] = {}
        self._transport = transport
        transport.send(CONTROLLER, self._hello())

    def find_controller(self, num_returns: int) -> None:
        """Let go of what a controller wanted that is gone, and greet the one in its place."""
        pending = [entry.session.request_id for entry in self.core.pulls.pending]
        for request_id in (*self.core.sequences, *pending):
            self.deliver(Cancel(request_id=request_id))
        for worker_id, epoch in list(self._peers.items()):
            self.deliver(PeerDown(worker_id=worker_id, epoch=epoch))
        self._transport.send(CONTROLLER, self._hello(num_returns))

    def _hello(self, num_returns: int = 0) -> Hello:
        return Hello(info=introduction(self.config), num_returns=num_returns)

    def deliver(self, event: Event) -> None:
        """Take an event in, unless dead."""
        if isinstance(event, PeerUp):
            self._peers[event.info.worker_id] = event.info.epoch
        elif isinstance(event, PeerDown):
            self._peers.pop(event.worker_id, None)
        if self.is_alive:
            self._node.deliver(event)


@dataclass(slots=True)
class Outcome:
    """What the client of one request saw."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    first_token_ns: int = 0
    finished_ns: int = 0
    has_arrived: bool = False

    @property
    def is_over(self) -> bool:
        """True when the client was told the end."""
        return self.finish_reason is not None or self.error is not None


class _Guarded:
    """A core whose invariants are checked after everything it handles."""

    def __init__(self, core: Controller) -> None:
        self.core = core

    def handle(self, event: Event, now_ns: int) -> list[Command]:
        commands = self.core.handle(event, now_ns)
        self.core.check()
        return commands


class SimCluster:
    """A simulated cluster. Schedule with `submit`, `cancel`, `kill`; then `run`."""

    def __init__(self, spec: ClusterSpec, seed: int = 0) -> None:
        self.spec = spec
        self.clock = SimClock()
        self.network = SimNetwork(self.clock, spec.link_cost, random.Random(seed))
        self.outcomes: dict[RequestId, Outcome] = {}
        self.log = DecisionLog()
        self._cancelled: set[RequestId] = set()
        self._num_restarts = 0
        self._start_controller()
        self.network.join(FRONT, self._take)
        self.workers = {name: SimWorker(spec, self.network, name, 1) for name in spec.roles}

    def _start_controller(self) -> None:
        life = self._num_restarts

        def is_alive() -> bool:
            return life == self._num_restarts

        self.controller = Controller(self.spec.controller)
        self._node = Node(
            _Guarded(self.controller),
            clock=MortalClock(self.clock, is_alive),
            transport=SimTransport(self.network, CONTROLLER, is_alive=is_alive),
            log=self.log,
        )
        self.network.join(CONTROLLER, self._node.deliver)

    def submit(self, request: Request, at_ns: int) -> None:
        """Schedule a request's arrival."""
        outcome = self.outcomes[request.request_id] = Outcome()

        def arrive() -> None:
            outcome.has_arrived = True
            self._node.deliver(Submit(request=request))

        self.clock.call_at(at_ns, arrive)

    def cancel(self, request_id: RequestId, at_ns: int) -> None:
        """Schedule a client's leaving."""

        def leave() -> None:
            self._cancelled.add(request_id)
            self._node.deliver(Cancel(request_id=request_id))

        self.clock.call_at(at_ns, leave)

    def kill(self, name: str, at_ns: int) -> None:
        """Schedule a worker's death; its successor joins with the next epoch some time later."""
        self.clock.call_at(at_ns, lambda: self._kill(name))

    def set_role(self, name: str, role: Role, at_ns: int) -> None:
        """Schedule a change of a worker's label, as a person asks for it."""
        change = SetRole(worker_id=WorkerId(name), role=role, is_pinned=True)
        self.clock.call_at(at_ns, lambda: self._node.deliver(change))

    def restart_controller(self, at_ns: int) -> None:
        """Schedule the controller's death: another takes its place, and the workers find it with
        their blocks. What was under way is lost with it, and its clients know.
        """
        self.clock.call_at(at_ns, self._restart_controller)

    def run(self, *, limit_s: float = 600.0) -> None:
        """Run until nothing is left to do.

        Raises: `AssertionError` when an invariant breaks or when the cluster is still busy at the
        limit.
        """
        is_over = self.clock.run(until_ns=int(limit_s * NS_PER_S), after_each=self.check)
        assert is_over, f"still busy after {limit_s} simulated seconds"

    def check(self) -> None:
        """Assert every core's invariants."""
        for worker in self.workers.values():
            if worker.is_alive:
                worker.core.check()

    def is_unwanted(self, request_id: RequestId) -> bool:
        """True when the client left."""
        return request_id in self._cancelled

    def story(self, key: str) -> str:
        """Return everything that happened to one request, over all nodes."""
        logs: list[tuple[str, Callable[[str], list[str]]]] = [("controller", self.log.story)]
        logs += [(name, worker.log.story) for name, worker in self.workers.items()]
        return "\n".join(f"{name}: {line}" for name, story in logs for line in story(key))

    def _kill(self, name: str) -> None:
        worker = self.workers[name]
        if not worker.is_alive:
            return
        worker.is_alive = False
        epoch = worker.config.epoch
        self.network.leave(worker.config.worker_id, epoch)
        lost = WorkerLost(worker_id=worker.config.worker_id, epoch=epoch, reason="killed")
        now_ns = self.clock.now_ns()
        self.clock.call_at(now_ns + self.spec.detection_ns, lambda: self._node.deliver(lost))
        self.clock.call_at(now_ns + self.spec.respawn_ns, lambda: self._respawn(name, epoch + 1))

    def _restart_controller(self) -> None:
        self._num_restarts += 1
        self._start_controller()
        for outcome in self.outcomes.values():
            if outcome.has_arrived and not outcome.is_over:
                outcome.error = RESTARTED
        for worker in self.workers.values():
            if worker.is_alive:
                worker.find_controller(self._num_restarts)

    def _respawn(self, name: str, epoch: int) -> None:
        self.workers[name] = SimWorker(self.spec, self.network, name, epoch, self.workers[name])

    def _take(self, message: Message) -> None:
        match message:
            case Tokens(outputs=outputs):
                for output in outputs:
                    if self.outcomes[output.request_id].error != RESTARTED:
                        self._take_output(output)
            case RequestFailed(request_id=request_id, reason=reason):
                outcome = self.outcomes[request_id]
                if outcome.error == RESTARTED:
                    return  # it was on its way from the one that is gone
                assert not outcome.is_over, f"{request_id} ended twice"
                outcome.error = reason
            case _:
                raise AssertionError(f"a {type(message).__name__} is not for the front end")

    def _take_output(self, output: TokenOutput) -> None:
        outcome = self.outcomes[output.request_id]
        assert not outcome.is_over, f"{output.request_id} got tokens after its end"
        outcome.first_token_ns = outcome.first_token_ns or self.clock.now_ns()
        outcome.token_ids += output.token_ids
        if output.finish_reason is not None:
            outcome.finish_reason = output.finish_reason.value
            outcome.finished_ns = self.clock.now_ns()
