"""`ModelledCluster`: the production cores over modelled hardware and a shared network.

What `penstock sim serve` runs. It differs from `SimCluster` (`penstock/sim/run.py`) in its ports
alone: blocks hold no bytes, steps take the time of a GPU, nothing is checked after every event. The
result is when every request got its tokens, and how busy everybody was (`Observation`).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count

from penstock.control.controller import Controller
from penstock.control.policies import USES_PREFIXES
from penstock.core.block import KVLayout
from penstock.core.config import ControllerConfig, Handoff, WorkerConfig
from penstock.core.events import Configured, Event, Move, MoveDone, Retire, WorkerLost
from penstock.core.messages import (
    Hello,
    Message,
    RequestFailed,
    Resize,
    Stop,
    Submit,
    TokenOutput,
    Tokens,
)
from penstock.core.node import DecisionLog, Node
from penstock.core.request import Request, SamplingParams
from penstock.core.types import CONTROLLER, FRONT, NS_PER_MS, NS_PER_S, RequestId, WorkerId
from penstock.sim.clock import SimClock
from penstock.sim.fabric import ControllerPort, Fabric, FabricCost
from penstock.sim.fleet import Member
from penstock.sim.life import MortalClock, introduction
from penstock.sim.modelled import ModelledExecutor
from penstock.sim.observe import Observation, Sample, Served, WorkerSample
from penstock.sim.profile import layout_of
from penstock.sim.workload import Arrival
from penstock.worker.worker import Worker

DETECTION_NS = 20 * NS_PER_MS
NAMES_INTERVAL_NS = 100 * NS_PER_MS


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSpec:
    """What to simulate besides the workload.

    `layout` is that of the hardware's model, in blocks of `block_size` tokens, unless given.
    `max_repeats` bounds how many decode steps are run at one go when nothing else happens to a
    worker: the result is the same with 1, and takes twenty times as long.
    `is_defragmenting` is off because its plans take as long to make as all else, and what they
    save, microseconds of a pull, is beneath what is asked here. A dead worker stays away for
    `respawn_ns`, and as long takes one that the controller asks for, on the host and the hardware
    of the first of its role; everybody is looked at once per `sample_ns`. `seed` is of what is
    drawn where a calibration says how uneven steps and messages are.
    """

    members: tuple[Member, ...]
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    fabric: FabricCost = field(default_factory=FabricCost)
    layout: KVLayout | None = None
    block_size: int = 128
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 1 << 17
    handoff: Handoff = Handoff.STREAM
    is_prefix_caching: bool = True
    is_defragmenting: bool = False
    max_repeats: int = 64
    respawn_ns: int = 10 * NS_PER_S
    sample_ns: int = NS_PER_S
    seed: int = 0

    @property
    def tells_names(self) -> bool:
        """True when workers tell which blocks they have: nobody else is asked for them."""
        return self.is_prefix_caching and self.controller.policy in USES_PREFIXES


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happens to a worker: it is killed, or runs at `speed` from then on."""

    name: str
    at_ns: int
    speed: float = 0.0


class ModelledWorker:
    """A worker core on modelled hardware, for one life."""

    def __init__(
        self,
        spec: ServeSpec,
        fabric: Fabric,
        member: Member,
        epoch: int,
        is_crowded: Callable[[], bool] = lambda: False,
    ) -> None:
        hardware = member.hardware
        layout = spec.layout or layout_of(hardware.model, spec.block_size)
        num_blocks = hardware.capacity_tokens // layout.block_size
        # So that roles are spread over hosts. Not where workers come and go, which is for those of
        # the server's own host, nor for pushes, which workers do only within one: either is
        # modelled on all of them.
        is_elastic = spec.controller.workers_max > 0
        is_named = member.host > 0 and not is_elastic and spec.handoff is not Handoff.PUSH
        self.member = member
        self.config = WorkerConfig(
            worker_id=WorkerId(member.name),
            role=member.role,
            epoch=epoch,
            host=f"host-{member.host}" if is_named else "",
            layout=layout,
            num_blocks=hardware.num_blocks or (num_blocks,) * len(layout.groups),
            max_model_len=spec.max_model_len,
            max_num_seqs=spec.max_num_seqs,
            max_num_batched_tokens=spec.max_num_batched_tokens,
            handoff=spec.handoff,
            is_prefix_caching=spec.is_prefix_caching,
            is_defragmenting=spec.is_defragmenting,
            max_repeats=spec.max_repeats if hardware.spread is None else 1,
            names_interval_ns=NAMES_INTERVAL_NS if spec.tells_names else None,
        )
        self.core = Worker(self.config)
        self.executor = ModelledExecutor(
            fabric.clock, hardware.times, hardware.spread, is_crowded, seed=spec.seed
        )
        self.is_alive = True
        self.has_left = False
        self._fabric = fabric
        clock = MortalClock(fabric.clock, lambda: self.is_alive)
        self._node = Node(self.core, clock=clock, transport=self, executor=self.executor)

    def start(self) -> None:
        """Join the cluster."""
        self._fabric.join(self.config.worker_id, self.config.epoch, self.deliver)
        self.send(CONTROLLER, Hello(info=introduction(self.config, self.member.hardware.profile)))

    def deliver(self, event: Event) -> None:
        """Take an event in, unless dead. Repeated steps stop for it."""
        if not self.is_alive:
            return
        self.executor.stop()
        self._node.deliver(event)
        if isinstance(event, Stop):
            self.is_alive, self.has_left = False, True
            self._fabric.leave(self.config.worker_id)

    def send(self, to: WorkerId, message: Message) -> None:
        """Say something, if still alive."""
        if self.is_alive:
            self._fabric.send(to, message, self.config.worker_id)

    def submit(self, move: Move, done: Callable[[MoveDone], None]) -> None:
        """Pull blocks."""
        block_bytes = self.config.layout.block_bytes
        self._fabric.submit(self.config.worker_id, block_bytes, move, self.deliver)

    def sample(self) -> WorkerSample:
        """Return how busy this worker is and has been."""
        executor, load = self.executor, self.core.load()
        total = self.config.num_blocks[0]
        held = total - load.free_blocks[0] - load.cached_blocks[0]
        return WorkerSample(
            busy_ns=executor.busy_ns,
            prefill_ns=executor.prefill_ns,
            waiting=load.waiting,
            running=load.running,
            held_share=held / total,
        )


class ModelledCluster:
    """A cluster that serves one workload. Call `run` once."""

    def __init__(
        self, spec: ServeSpec, arrivals: Iterable[Arrival], log: DecisionLog | None = None
    ) -> None:
        self.spec = spec
        self.clock = SimClock()
        self._hosts = {WorkerId(m.name): m.host for m in spec.members}
        self.fabric = Fabric(self.clock, spec.fabric, self._hosts, seed=spec.seed)
        self.controller = Controller(spec.controller)
        self.workers: dict[str, ModelledWorker] = {}
        self._coming: set[str] = set()
        self.observation = Observation()
        self._arrivals: Iterator[Arrival] = iter(arrivals)
        self._is_exhausted = False
        self._under_way: dict[RequestId, tuple[Served, Arrival]] = {}
        self._num_submitted = 0
        self._num_to_come = 0
        transport = ControllerPort(self.fabric)
        self._node = Node(self.controller, clock=self.clock, transport=transport, log=log)
        self.fabric.join(CONTROLLER, 0, self._node.deliver)
        self.fabric.join(FRONT, 0, self._take)
        self._node.deliver(Configured(spec.controller))

    def run(
        self,
        *,
        limit_s: float,
        faults: Iterable[Fault] = (),
        progress: Callable[[float, int, int], None] = lambda *_: None,
    ) -> Observation:
        """Serve everything that arrives; stop when all is answered, or at `limit_s`.

        `progress` is called about once a simulated second with that second, and how many requests
        have arrived and ended.
        """
        for member in self.spec.members:
            self._start(member, 1)
        for fault in faults:
            self.clock.call_at(fault.at_ns, partial(self._strike, fault))
        self.clock.call_at(2 * self.spec.fabric.latency_ns, self._arm)
        self._sample(progress)
        self.clock.run(until_ns=int(limit_s * NS_PER_S), is_over=lambda: self.is_over)
        self.observation.ended_ns = self.clock.now_ns()
        self.observation.unfinished = len(self._under_way)
        self.observation.num_events = self.clock.num_called
        self.observation.note_books(self.fabric, self.workers.values())
        limits = self.controller.status().limits
        self.observation.started, self.observation.retired = limits.started, limits.retired
        return self.observation

    @property
    def is_over(self) -> bool:
        """True when everything that was to arrive has arrived and is answered."""
        return self._is_exhausted and not self._under_way and not self._num_to_come

    # ------------------------------------------------------------------------------------- requests

    def _arm(self) -> None:
        """Schedule the next arrival; only one at a time is in memory."""
        arrival = next(self._arrivals, None)
        if arrival is None:
            self._is_exhausted = True
            return

        def arrive() -> None:
            self._submit(arrival)
            self._arm()

        self.clock.call_at(arrival.at_ns, arrive)

    def _submit(self, arrival: Arrival) -> None:
        self._num_submitted += 1
        request_id = RequestId(f"r{self._num_submitted}")
        now_ns = self.clock.now_ns()
        request = Request(
            request_id=request_id,
            prompt_token_ids=arrival.prompt(),
            params=SamplingParams(max_tokens=arrival.output_tokens, seed=0, ignore_eos=True),
            arrived_ns=now_ns,
        )
        served = Served(now_ns, arrival.input_tokens, arrival.output_tokens)
        self.observation.served.append(served)
        self._under_way[request_id] = served, arrival
        self._node.deliver(Submit(request=request))

    def _take(self, message: Message) -> None:
        match message:
            case Tokens(outputs=outputs):
                for output in outputs:
                    self._take_output(output)
            case RequestFailed(request_id=request_id, reason=reason):
                served, _ = self._under_way.pop(request_id)
                served.error = reason
                self.observation.num_ended += 1
            case Resize():
                self._resize(message)
            case _:
                raise AssertionError(f"a {type(message).__name__} is not for the front end")

    def _take_output(self, output: TokenOutput) -> None:
        served, arrival = self._under_way[output.request_id]
        now_ns = self.clock.now_ns()
        served.take(len(output.token_ids), output.timeline, now_ns)
        if output.finish_reason is None:
            return
        served.finished_ns = now_ns
        del self._under_way[output.request_id]
        self.observation.num_ended += 1
        # A turn's new tokens are named by its number, from the top, out of every trace's way.
        follower = arrival.next_turn(now_ns, (1 << 32) - 1 - self._num_submitted)
        if follower is not None:
            self._num_to_come += 1
            self.clock.call_at(follower.at_ns, lambda: self._follow(follower))

    def _follow(self, arrival: Arrival) -> None:
        self._num_to_come -= 1
        self._submit(arrival)

    # -------------------------------------------------------------------------------------- workers

    def _start(self, member: Member, epoch: int) -> None:
        worker = ModelledWorker(
            self.spec, self.fabric, member, epoch, partial(self._has_busy_neighbour, member)
        )
        before = self.workers.get(member.name)
        if before is not None:
            worker.executor.continue_from(before.executor)
        self.workers[member.name] = worker
        self._coming.discard(member.name)
        worker.start()

    def _resize(self, change: Resize) -> None:
        """Start and retire workers as the controller asks."""
        now_ns = self.clock.now_ns()
        for role in change.start:
            like = next((m for m in self.spec.members if m.role is role), self.spec.members[0])
            names = (f"{role.value}-{number}" for number in count())
            member = replace(like, name=next(filter(self._is_free, names)), role=role)
            self._hosts[WorkerId(member.name)] = member.host
            self._coming.add(member.name)
            before = self.workers.get(member.name)
            start = partial(self._start, member, before.config.epoch + 1 if before else 1)
            self.clock.call_at(now_ns + self.spec.respawn_ns, start)
        if change.retire is not None:
            epoch = self.workers[change.retire].config.epoch
            self._node.deliver(Retire(change.retire, epoch))

    def _is_free(self, name: str) -> bool:
        worker = self.workers.get(name)
        return name not in self._coming and (worker is None or worker.has_left)

    def _has_busy_neighbour(self, member: Member) -> bool:
        """Tell whether another worker of the same host is in a step."""
        return any(
            other.is_alive and other.executor.is_running
            for other in self.workers.values()
            if other.member.host == member.host and other.member is not member
        )

    def _strike(self, fault: Fault) -> None:
        worker = self.workers[fault.name]
        if fault.speed:
            worker.executor.speed = fault.speed
        elif worker.is_alive:
            self._kill(worker)

    def _kill(self, worker: ModelledWorker) -> None:
        worker.is_alive = False
        config, now_ns = worker.config, self.clock.now_ns()
        self.fabric.leave(config.worker_id)
        lost = WorkerLost(worker_id=config.worker_id, epoch=config.epoch, reason="killed")
        self.clock.call_at(now_ns + DETECTION_NS, lambda: self._node.deliver(lost))
        back_ns = now_ns + max(self.spec.respawn_ns, DETECTION_NS + 1)
        self.clock.call_at(back_ns, lambda: self._start(worker.member, config.epoch + 1))

    # ---------------------------------------------------------------------------------- observation

    def _sample(self, progress: Callable[[float, int, int], None]) -> None:
        """Note how busy everybody is, once per `sample_ns`."""
        now_ns, seen = self.clock.now_ns(), self.observation
        status = self.controller.status()
        roles = {str(w.info.worker_id): (w.role or w.info.role).value for w in status.workers}
        workers = {name: worker.sample() for name, worker in self.workers.items()}
        seen.note(Sample(now_ns, self._num_submitted, seen.num_ended, roles, workers))
        progress(now_ns / NS_PER_S, self._num_submitted, seen.num_ended)
        self.clock.call_at(now_ns + self.spec.sample_ns, lambda: self._sample(progress))
