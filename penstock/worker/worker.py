"""`Worker`: the core that decides for one worker, whatever its role.

Takes assignments and offers in, gives steps and moves out, and tells the controller what came of
them. It composes the scheduler (what runs), the KV cache (where), and the two halves of the
hand-off (`OfferDesk`, `PullDesk`); those own their states, this class owns the table of all
sequences and the one step under way.

A role is a label for the controller: this code never asks for it. Whether a sequence is handed off
is said by its assignment.
"""

from collections.abc import Iterable

from penstock.core.config import WorkerConfig
from penstock.core.events import Command, Event, MoveDone, RunStep, Send, StepDone, Woken
from penstock.core.messages import (
    Assign,
    Cancel,
    Grant,
    Load,
    Migrate,
    Offer,
    PeerDown,
    PeerUp,
    Progress,
    Release,
    Renew,
    Withdraw,
)
from penstock.core.tiers import ShelfChanged, ShelfUsed
from penstock.core.types import RequestId, WorkerId
from penstock.kv.cache import KVCache
from penstock.kv.pool import Generations
from penstock.worker.books import check_sequences
from penstock.worker.decode import RENEW_KEY, PullDesk
from penstock.worker.defragment import DEFRAGMENT_KEY, Defragmenter
from penstock.worker.lease import LEASE_KEY
from penstock.worker.numbers import Numbers
from penstock.worker.output import not_handed_off, take_token, tell_tokens
from penstock.worker.report import Reporter
from penstock.worker.scheduler import Plan, Scheduler
from penstock.worker.sequence import Sequence, SequenceState
from penstock.worker.source import SourceDesk
from penstock.worker.tiers import TIERS_KEY, TierDesk
from penstock.worker.traffic import Traffic


class Worker:
    """The core of one worker. `handle` is the only way in.

    `generations`, one array per KV group, is where peers can see how often each block was handed
    out.
    """

    def __init__(self, config: WorkerConfig, generations: tuple[Generations, ...] = ()) -> None:
        self.config = config
        self.kv = KVCache(
            config.layout,
            config.num_blocks,
            is_prefix_caching=config.is_prefix_caching,
            generations=generations,
        )
        self.scheduler = Scheduler(config, self.kv)
        move_ids = Numbers()
        self.traffic = Traffic(config)
        self.offers = SourceDesk(config, self.kv, move_ids)
        self.pulls = PullDesk(config, self.kv, move_ids)
        self.defragmenter = Defragmenter(config, self.kv, move_ids)
        self.tiers = TierDesk(config, self.kv, self.scheduler, self.traffic, move_ids)
        self.sequences: dict[RequestId, Sequence] = {}
        self._peers: set[WorkerId] = set()
        self._plan: Plan | None = None
        self._leaving: dict[RequestId, WorkerId] = {}
        self._arrivals = Numbers()
        desks = (self.offers, self.pulls, self.tiers)
        self._reporter = Reporter(config, self.kv, self.scheduler, *desks)

    @property
    def is_idle(self) -> bool:
        """True when this worker has nothing to do and keeps nothing for anybody."""
        return not self.sequences and not self.pulls.arrivals and self._plan is None

    def handle(self, event: Event, now_ns: int) -> list[Command]:
        """Take one event in; return the acts that follow, a new step among them if none is under
        way.
        """
        self.kv.retention.tell_time(now_ns)
        said = self._react(event, now_ns)
        # Their last tokens are said before it is said that they are offered.
        said += self._send_away(now_ns)
        self.tiers.bring(now_ns)
        # Acts come first: the next step starts while messages are still being sent.
        acts = self._go_on(now_ns) + said + self.defragmenter.due(now_ns, is_idle=self.is_idle)
        acts += self.tiers.due(now_ns, is_idle=self.is_idle)
        # Blocks that are being relocated are neither free nor cached: the last word comes after it.
        is_idle = self.is_idle and not (self.defragmenter.is_busy or self.tiers.num_fetches)
        acts += self._reporter.due(now_ns, is_idle=is_idle)
        return self.traffic.pass_on(acts, now_ns)

    def _react(self, event: Event, now_ns: int) -> list[Command]:
        match event:
            case StepDone():
                return self._finish_step(event, now_ns)
            case Assign():
                return self._assign(event, now_ns)
            case Offer():
                known = self._release_if_running(event.request.request_id, event.source)
                return known or self.pulls.receive(event, now_ns)
            case MoveDone():
                return self._land(event, now_ns)
            case Progress():
                known = self._release_if_running(event.request_id, event.source)
                return known or self.pulls.progress(event, now_ns)
            case Release():
                return self._end_crossings(self.offers.release(event))
            case Grant():
                return self._end_crossings(*self.offers.grant(event, now_ns))
            case Renew():
                return self.offers.renew(event, now_ns)
            case Woken(key=key):
                return self._wake(key, now_ns)
            case Cancel(request_id=request_id):
                return self._cancel(request_id, now_ns)
            case Migrate(request_id=request_id, decode_worker=decode_worker):
                self._leaving[request_id] = decode_worker
                return []
            case Withdraw():
                return self._answer_withdraw(event, now_ns)
            case PeerUp(info=info):
                self._peers.add(info.worker_id)
                self.pulls.meet(info.worker_id, info.layout)
                self.offers.meet(info)
                self.tiers.meet(info)
                return []
            case PeerDown(worker_id=worker_id):
                self._peers.discard(worker_id)
                self.tiers.forget(worker_id, event.epoch)
                for sequence in self.pulls.drop_all_of(worker_id, now_ns):
                    self._take_in(sequence)
                return self._end_crossings(self.offers.release_all_of(worker_id))
            case ShelfChanged() | ShelfUsed():
                self.tiers.hear(event)
                return []
            case _:
                return self._reporter.answer(event, now_ns)

    # -------------------------------------------------------------------------- one thing at a time

    def _assign(self, event: Assign, now_ns: int) -> list[Command]:
        is_ours = event.decode_worker == self.config.worker_id
        sequence = Sequence(
            event.request,
            self.config,
            arrival=self._arrivals.next(),
            timeline=event.timeline,
            decode_worker=None if is_ours else event.decode_worker,
        )
        assert sequence.request_id not in self.sequences, sequence.request_id
        self.sequences[sequence.request_id] = sequence
        sequence.selects_here = is_ours or self.offers.is_alike(event.decode_worker)
        self.tiers.add(sequence, now_ns)
        is_known = not is_ours and event.decode_worker in self._peers
        return self.offers.announce(sequence, now_ns) if is_known else []

    def _release_if_running(self, request_id: RequestId, source: WorkerId) -> list[Command]:
        """Answer what is said of a request that runs here: it comes late, or again."""
        sequence = self.sequences.get(request_id)
        if sequence is None or sequence.state is SequenceState.HANDING_OFF:
            return []
        return [self._release_to(source, request_id)]

    def _land(self, event: MoveDone, now_ns: int) -> list[Command]:
        self.traffic.land(event, now_ns)
        if self.defragmenter.land(event) or self.tiers.land(event, now_ns):
            return []
        pushed = self.offers.land(event)
        if pushed is not None:
            return self._end_crossings(*pushed)
        self._reporter.note_pull(self.pulls.source_of(event.move_id), event)
        sequence, commands = self.pulls.land(event, now_ns)
        self._take_in(sequence)
        return commands

    def _take_in(self, sequence: Sequence | None) -> None:
        """Go on with a sequence whose arrival is over: run it, compute it here, or forget it."""
        if sequence is None:
            return
        match sequence.state:
            case SequenceState.WAITING:
                self.scheduler.add_first(sequence)
            case SequenceState.GONE:
                self._drop(sequence)
            case _:
                self.scheduler.start(sequence)

    def _wake(self, key: str, now_ns: int) -> list[Command]:
        if key == RENEW_KEY:
            return self.pulls.renew(now_ns)
        if key == DEFRAGMENT_KEY:
            return self.defragmenter.wake()
        if key == TIERS_KEY:
            return []
        assert key == LEASE_KEY, key
        return self._end_crossings(*self.offers.expire(now_ns))

    def _cancel(self, request_id: RequestId, now_ns: int) -> list[Command]:
        """Stop a request. Blocks that a step or a copy still touches are freed after it."""
        sequence = self.sequences.get(request_id)
        if sequence is None or request_id in self.pulls.arrivals:
            arrived, commands = self.pulls.drop(request_id, now_ns)
            self._take_in(arrived)
            return commands
        if request_id in self.offers.crossings:
            return self._take_back(sequence)
        if sequence.state is not SequenceState.CLOSING:
            self._stop(sequence)
        return []

    def _take_back(self, sequence: Sequence) -> list[Command]:
        """Withdraw what is offered of a sequence, finished or not; a peer may be reading it."""
        if sequence.state is SequenceState.RUNNING:
            self.scheduler.remove(sequence)
            sequence.move_to(SequenceState.HANDING_OFF)
        return self._end_crossings(*self.offers.withdraw(sequence))

    def _end_crossings(
        self, sequences: Iterable[Sequence], commands: Iterable[Command] = ()
    ) -> list[Command]:
        """Stop and free sequences whose blocks no peer reads any more."""
        for sequence in sequences:
            self._stop(sequence)
        return list(commands)

    def _stop(self, sequence: Sequence) -> None:
        """Take a sequence out of the line; it is freed now, or after the step that writes it."""
        self.scheduler.remove(sequence)
        if self._is_in_step(sequence):
            sequence.move_to(SequenceState.CLOSING)
        else:
            self._forget(sequence)

    def _answer_withdraw(self, event: Withdraw, now_ns: int) -> list[Command]:
        """Answer a prefill worker that wants its blocks back, or has none of them any more.

        A pull under way is let finish, and its landing releases. What has been pulled already goes
        on: if nobody wants it, the controller says so.
        """
        request_id = event.request_id
        if request_id in self.pulls.arrivals:
            sequence, commands = self.pulls.drop(request_id, now_ns, is_fenced=True)
            self._take_in(sequence)
            return commands
        if request_id not in self.sequences:
            self.pulls.bury(request_id)
        return [self._release_to(event.source, request_id)]

    def _forget(self, sequence: Sequence) -> None:
        """Give back whatever blocks a sequence holds and drop it."""
        if sequence.state is not SequenceState.WAITING:
            sequence.retain(self.kv.retention)
            self.kv.close(sequence.request_id)
        sequence.move_to(SequenceState.GONE)
        self._drop(sequence)

    def _drop(self, sequence: Sequence) -> None:
        del self.sequences[sequence.request_id]
        self.pulls.bury(sequence.request_id)

    def _release_to(self, source: WorkerId, request_id: RequestId) -> Command:
        return Send(source, Release(request_id=request_id, worker_id=self.config.worker_id))

    def _is_in_step(self, sequence: Sequence) -> bool:
        return self._plan is not None and any(part is sequence for part, _ in self._plan.parts)

    # ------------------------------------------------------------------------------ steps and moves

    def _go_on(self, now_ns: int) -> list[Command]:
        """Start every pull that has room, and a step if none is under way."""
        commands: list[Command] = []
        while self._has_seat():
            headroom = len(self.scheduler.running)
            admitted = self.pulls.admit(self._arrivals.next(), headroom, now_ns)
            if admitted is None:
                break
            sequence, more = admitted
            self.sequences[sequence.request_id] = sequence
            commands += more
        commands += self.scheduler.end_if_outdated(self._plan, bool(self._leaving))
        while self._plan is None:
            self._plan = self.scheduler.schedule()
            ready = self.scheduler.stamp_started(now_ns)
            commands += [c for sequence in ready for c in self._hand_off(sequence, now_ns)]
            if self._plan is not None:
                commands.append(RunStep(self._plan.step))
            elif self.tiers.num_fetches and not ready:
                break  # what comes out of a tier may be what somebody waits for
            elif (stuck := self.scheduler.last_pinned()) is not None:
                commands += [
                    *self._take_back(stuck),
                    not_handed_off(stuck, "there was no room", self.config),
                ]
            elif not ready:
                break  # else: handing off without a step made a seat for the next in line
        return commands

    def _send_away(self, now_ns: int) -> list[Command]:
        """Offer sequences that are to go on elsewhere, as soon as no step computes them.

        What has ended, is on its way already, or cannot go (`Sequence.can_go`) stays.
        """
        if self._plan is not None or not self._leaving:
            return []
        leaving, self._leaving = self._leaving, {}
        commands = []
        for request_id, decode_worker in leaving.items():
            sequence = self.sequences.get(request_id)
            if sequence is not None and sequence.can_go and decode_worker in self._peers:
                sequence.hand_to(decode_worker)
                commands += self._hand_off(sequence, now_ns)
        return commands

    def _has_seat(self) -> bool:
        """A pending offer may come in unless a preempted sequence waits for the same blocks."""
        taken = len(self.scheduler.running) + self.pulls.num_admitted
        waiting = self.scheduler.waiting
        return taken < self.config.max_num_seqs and not (waiting and waiting[0].is_preempted)

    def _hand_off(self, sequence: Sequence, now_ns: int) -> list[Command]:
        """Offer what is new; a sequence that is complete leaves the line."""
        if sequence.decode_worker in self._peers:
            commands = self.offers.offer(sequence, now_ns)
            if sequence.state is SequenceState.HANDING_OFF:
                self.scheduler.remove(sequence)
            return commands
        # It died while we worked. Nobody would ever release the blocks, so they are not offered.
        self.scheduler.remove(sequence)
        self._forget(sequence)
        reason = f"decode worker {sequence.decode_worker} was lost"
        return [not_handed_off(sequence, reason, self.config)]

    def _finish_step(self, event: StepDone, now_ns: int) -> list[Command]:
        plan, self._plan = self._plan, None
        assert plan is not None, event.step_id
        if event.goes_on:
            self._plan = plan.followed(event.sampled, self.config.layout.block_size)
        assert plan.step.step_id == event.step_id, (plan.step.step_id, event.step_id)
        # A failed step is a bug: the process ends, and its requests go elsewhere.
        assert event.error is None, event.error
        self._reporter.note_step(plan.step, event)
        commands: list[Command] = []
        if event.digests:
            taken = zip(plan.step.digests_of, event.digests, strict=True)
            for group, (block_ids, digests) in enumerate(taken):
                self.kv.note_digests(group, zip(block_ids, digests, strict=True))
        drawn = plan.run_ahead(event.sampled)
        for sequence, num_new in plan.parts:
            if sequence.state is SequenceState.CLOSING and not event.goes_on:
                self._forget(sequence)
                continue
            if sequence.state is not SequenceState.RUNNING:
                continue  # taken back meanwhile; freed when the peer has answered
            sequence.num_computed += num_new
            self._advance(sequence)
        plan.select(self.kv, event.scores, self.config.layout.block_size)
        for sequence in plan.leaving:
            commands += self._hand_off(sequence, now_ns)
        outputs = []
        for sequence, ahead, last in drawn:
            if sequence.state is not SequenceState.RUNNING:
                continue
            outputs.append(take_token(sequence, ahead, last, self.config.worker_id, now_ns))
            if outputs[-1].finish_reason is not None:
                self._stop(sequence)
        return commands + tell_tokens(outputs, self.config.worker_id)

    def _advance(self, sequence: Sequence) -> None:
        """Tell the cache about newly valid KV, when that completes a block or leaves a window."""
        if self.config.is_prefix_caching:
            sequence.name_blocks(self.config.layout.block_size)
        known, window = sequence.num_computed, sequence.window
        self.kv.advance(sequence.request_id, known, sequence.hashes, window=window)

    # -------------------------------------------------------------------------------- what one sees

    def load(self) -> Load:
        """Return how full this worker is."""
        return self._reporter.load()

    def check(self) -> None:
        """Assert that the books balance; called after every event in simulation."""
        self.kv.check()
        self.tiers.check()
        self.traffic.check()
        num_fetches = self.tiers.num_fetches
        check_sequences(self.sequences.values(), self.kv, self.scheduler, num_fetches)
        is_idle = self._plan is None and not self.scheduler.running
        if is_idle and self.scheduler.waiting:
            # Somebody must be holding what the first in line wants.
            held = self.offers.crossings or self.pulls.num_admitted or self.defragmenter.is_busy
            assert held or num_fetches, f"idle while {self.scheduler.waiting[0].request_id} waits"
