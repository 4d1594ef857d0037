"""`Fleet`: the workers that are up, and their books as columns, for a router that looks at all.

A worker has a slot, which is its row in every column and its bit in the prefix index. The truth is
in its `WorkerRecord`; whoever changes that calls `refresh`. Columns of workers that are gone, or
may not be given anything, are closed.

For a policy that holds requests back (ours; the classic ones push), a worker is *open* for prefills
while it has less than `admit_backlog_ms` of them ahead (a few are
always let in): enough to keep it busy until the next can reach it, and what waits longer waits at
the controller, where it can still go anywhere and where priorities count. It is open for decodes
while it has a seat, and for a request whose KV, as far as its output can be expected, has room
beside what is expected of the others, or is there already where that is more.
"""

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from penstock.control.columns import Columns
from penstock.control.cost import TransferCosts
from penstock.control.fit import Float64
from penstock.control.prefix_index import PrefixIndex
from penstock.control.record import WorkerRecord
from penstock.core.config import ControllerConfig
from penstock.core.descriptors import WorkerInfo
from penstock.core.messages import BlocksChanged, Load
from penstock.core.step import StepSample
from penstock.core.types import NS_PER_MS, BlockHash, Role, WorkerId

CLOSED: Final = 1e18
"""Added to the cost of what may not be taken; more than any cost."""
PREFILLS_MIN: Final = 4
"""Prefills that a worker is given however long they are expected to take."""


Slots = npt.NDArray[np.int64]


class Fleet(Columns):
    """All workers by name, in order of joining, and what the router needs of them by slot.

    `step` is the time of a decode step with one sequence more, without its context. The closed
    columns are 0 or `CLOSED`, each for one part a worker can have in a request; `prefill_barred` is
    so for those that prompts are not meant for, however busy the others are. `alone_charge` is 1
    where a prompt is not meant to be computed. `arriving` are bytes on their way to it, as many as
    take that long over the usual link. No worker has less room than `kv_free_least`, and none is
    behind after `spare_until_ns`.
    """

    def __init__(self, config: ControllerConfig, *, is_holding: bool = True) -> None:
        super().__init__()
        self.workers: dict[WorkerId, WorkerRecord] = {}
        self.index = PrefixIndex()
        self.transfers = TransferCosts()
        self.names: tuple[WorkerId, ...] = ()
        self.host_of: tuple[str, ...] = ()
        """Of every slot, as are `names`; empty where nobody is."""
        self.hosts: dict[str, Slots] = {}
        """The slots on every host."""
        self.token_bytes = 1
        self.has_pairs = False
        self.kv_free_least = CLOSED
        self.spare_until_ns = 0.0
        self.capacity_least: float = CLOSED
        """Tokens whose KV the smallest pool holds."""
        self.work_ns = 0.0
        """Predicted time of all prefills ever assigned."""
        self.output_tokens = 0
        """Expected of all requests ever assigned."""
        self.num_booked = 0
        """How many those are."""
        self.landing_tokens = 0
        """Of prompts that are computed and have not arrived where they decode."""
        self.landed_tokens = 0
        self.leaving: list[WorkerRecord] = []
        self._by_slot: list[WorkerRecord | None] = []
        self._open: list[bool] = []
        self._has_turn: list[bool] = []
        self._has_seat: list[bool] = []
        self._block_sizes: tuple[int, ...] = ()
        self._is_holding = is_holding
        self._admit_ns = config.admit_backlog_ms * NS_PER_MS

    def __iter__(self) -> Iterator[WorkerRecord]:
        return iter(self.workers.values())

    # ---------------------------------------------------------------------------------- membership

    def join(self, info: WorkerInfo) -> WorkerRecord:
        """Take a worker in, without any blocks."""
        worker = WorkerRecord(info, self.index.add_worker())
        self.workers[info.worker_id] = worker
        if self.index.num_slots > len(self._by_slot):
            added = self.index.num_slots - len(self._by_slot)
            self._by_slot += [None] * added
            self._open += [False] * added
            self._has_turn += [True] * added
            self._has_seat += [True] * added
            self.resize(self.index.num_slots)
        self._by_slot[worker.slot] = worker
        self.token_bytes = info.layout.token_bytes
        self.transfers.join(info.worker_id, info.host)
        self._learn(worker, ())
        self.reopen()
        return worker

    def leave(self, worker: WorkerRecord) -> None:
        """Forget a worker, with its blocks."""
        del self.workers[worker.info.worker_id]
        self.index.drop_worker(worker.slot)
        self.transfers.forget(worker.info.worker_id)
        self._by_slot[worker.slot] = None
        self.reopen()

    def reopen(self) -> None:
        """Work out anew who may be given what, after somebody came, went or changed its label.

        One that is suspected is left out while there is another. When a role has nobody left,
        whoever there is does both: a role is a label. O(workers).
        """
        staying = [w for w in self if not w.is_leaving]
        heard = [w for w in staying if not w.is_suspected] or staying
        self.leaving = [w for w in self if w.is_leaving]
        self.capacity_least = min((w.capacity_tokens for w in self), default=CLOSED)
        roles = {worker.role for worker in heard}
        self.has_pairs = Role.PREFILL in roles and Role.DECODE in roles
        self._open = [False] * len(self._by_slot)
        for worker in heard:
            self._open[worker.slot] = True
        self._block_sizes = tuple(dict.fromkeys(w.info.layout.block_size for w in self))
        self.names = tuple(w.info.worker_id if w else WorkerId("") for w in self._by_slot)
        self.host_of = tuple(w.info.host if w else "" for w in self._by_slot)
        slots: dict[str, list[int]] = {}
        for worker in self:
            slots.setdefault(worker.info.host, []).append(worker.slot)
        self.hosts = {host: np.array(there) for host, there in slots.items()}
        for slot, worker_there in enumerate(self._by_slot):
            if worker_there is not None:
                self.refresh(worker_there)
                self._admit(worker_there)
            else:
                self._close(slot)
                self.kv_free[slot] = CLOSED

    @property
    def link_ns_per_byte(self) -> float:
        """What a byte takes over the usual link: between hosts, where there are several."""
        transfers = self.transfers
        return (transfers.between if len(self.hosts) > 1 else transfers.within)[2]

    def link_bytes(self, source: WorkerRecord, to: WorkerRecord, num_tokens: int) -> float:
        """Return the bytes of a transfer, as many as take that long over the usual link."""
        if source is to:
            return 0.0
        num_bytes = num_tokens * self.token_bytes
        if len(self.hosts) > 1 and source.info.host == to.info.host:
            return num_bytes * self.transfers.within[2] / self.transfers.between[2]
        return num_bytes

    def at(self, slot: int) -> WorkerRecord:
        """Return the worker in a slot."""
        worker = self._by_slot[slot]
        assert worker is not None, f"nobody is in slot {slot}"
        return worker

    def is_candidate(self, worker: WorkerRecord) -> bool:
        """True while it may be given anything at all."""
        return self._open[worker.slot]

    # --------------------------------------------------------------------------------------- books

    def refresh(self, worker: WorkerRecord) -> None:
        """Bring a worker's columns up to date with its record. O(1)."""
        self.refresh_prefills(worker)
        self.refresh_decodes(worker)

    def refresh_prefills(self, worker: WorkerRecord) -> None:
        """Do so with what is about prompts."""
        slot, backlog_ns = worker.slot, worker.backlog_ns
        if self._by_slot[slot] is not worker:
            return  # what a dead worker had is taken off its books, which nobody reads any more
        backlog_least, free_at, prefill_tokens, spare_at = self.prefill_books
        backlog_least[slot] = backlog_ns / 2
        free_at[slot] = worker.free_at_ns
        prefill_tokens[slot] = worker.prefill_tokens
        spare_at[slot] = worker.spare_at_ns
        if worker.spare_at_ns > self.spare_until_ns:
            self.spare_until_ns = worker.spare_at_ns
        has_turn = worker.num_prefills < PREFILLS_MIN or backlog_ns < self._admit_ns
        if has_turn is not self._has_turn[slot]:
            self._has_turn[slot] = has_turn
            self._admit(worker)

    def refresh_decodes(self, worker: WorkerRecord) -> None:
        """Do so with what is about sequences."""
        slot, num_decodes = worker.slot, worker.num_decodes
        if self._by_slot[slot] is not worker:
            return
        arriving, step, seats, kv_free, decode_tokens = self.decode_books
        arriving[slot] = worker.arriving_bytes
        step[slot] = worker.step_ns
        seats[slot] = num_decodes
        decode_tokens[slot] = worker.decode_tokens
        # An idle worker takes what cannot fit anywhere else either.
        kv_free[slot] = CLOSED
        if num_decodes and self._is_holding:
            kv_free[slot] = room = worker.capacity_tokens - worker.taken_tokens
            if room < self.kv_free_least:
                self.kv_free_least = room
        has_seat = num_decodes < worker.seats_max
        if has_seat is not self._has_seat[slot]:
            self._has_seat[slot] = has_seat
            self._admit(worker)

    def _admit(self, worker: WorkerRecord) -> None:
        """Write who may be given what, which changes far less often than books do."""
        slot, role = worker.slot, worker.role
        if not self._open[slot]:
            self._close(slot)
            return
        has_turn = self._has_turn[slot] or not self._is_holding
        has_seat = self._has_seat[slot] or not self._is_holding
        takes_prompts = self.has_pairs and role is Role.PREFILL
        takes_decodes = self.has_pairs and role is Role.DECODE
        takes_both = not takes_prompts
        self.prefill_barred[slot] = 0.0 if takes_prompts else CLOSED
        self.prefill_closed[slot] = 0.0 if takes_prompts and has_turn else CLOSED
        self.decode_closed[slot] = 0.0 if takes_decodes and has_seat else CLOSED
        self.alone_closed[slot] = 0.0 if takes_both and has_turn and has_seat else CLOSED
        self.alone_charge[slot] = float(takes_decodes)

    def _close(self, slot: int) -> None:
        self.prefill_closed[slot] = self.prefill_barred[slot] = CLOSED
        self.decode_closed[slot] = self.alone_closed[slot] = CLOSED

    def wait_ns(self, now_ns: int) -> Float64:
        """Return how long a prompt would wait for its turn on each worker, [num_slots].

        Until the work before it should be done, which is never later than from now on; while that
        has been due for long it is half of it at least, for it is not done yet.
        """
        return self.put_wait(np.array(float(now_ns)), np.empty(len(self.free_at)))

    def put_wait(self, now_ns: Float64, out: Float64) -> Float64:
        """Write that to `out`, and return it."""
        np.subtract(self.free_at, now_ns, out)
        return np.maximum(out, self.backlog_least, out=out)

    def has_room(self, num_tokens: int) -> bool:
        """True when every worker has room for the KV of so many tokens more."""
        if num_tokens <= self.kv_free_least:
            return True
        # It only ever falls as books change, so that nobody has to look at all of them.
        self.kv_free_least = self.kv_free.item(self.kv_free.argmin())
        return num_tokens <= self.kv_free_least

    # ------------------------------------------------------------------------------------- reports

    def note_load(self, load: Load) -> None:
        """Take in a report: how full a worker is, and what its steps and pulls took."""
        worker = self.workers.get(load.worker_id)
        if worker is None:
            return
        worker.load = load
        if load.step_samples:
            self._learn(worker, load.step_samples)
            self.refresh(worker)
        if load.pull_samples:
            self.transfers.learn(load.worker_id, load.pull_samples)

    def _learn(self, worker: WorkerRecord, samples: tuple[StepSample, ...]) -> None:
        coefficients = worker.cost.learn(samples)
        self.coefficients[:, worker.slot] = coefficients
        a, b, c, d, e, f = coefficients.tolist()
        worker.prefill_coefficients, worker.decode_coefficients = (a, b, c), (d, e, f)

    def note_blocks(self, event: BlocksChanged) -> None:
        """Take in which blocks a worker has; what a former incarnation says is not heard."""
        worker = self.workers.get(event.worker_id)
        if worker is not None and worker.info.epoch == event.epoch:
            self.index.apply(worker.slot, event.stored, event.removed)

    def fit_errors(self) -> tuple[float, float]:
        """Return the latest errors of predicted steps, mean of all workers, and of transfers."""
        errors = [w.cost.fit.error for w in self if w.cost.fit.num_samples]
        step_error = sum(errors) / len(errors) if errors else 0.0
        return step_error, self.transfers.error

    def cached_tokens(self, token_ids: tuple[int, ...], root: BlockHash) -> Float64:
        """Return how many tokens of a prompt behind `root` every slot has, [num_slots]."""
        if not self._block_sizes:
            return np.zeros(len(self._by_slot))
        size, *others = self._block_sizes
        tokens = self.index.tokens(token_ids, size, root)
        for size in others:
            tokens = np.maximum(tokens, self.index.tokens(token_ids, size, root))
        return tokens

    def check(self) -> None:
        """Assert that columns are what the records say, and that slots are one to one."""
        self.index.check()
        for worker in self:
            slot = worker.slot
            assert self._by_slot[slot] is worker, worker.info.worker_id
            columns = (2 * self.backlog_least[slot], self.seats[slot], self.prefill_tokens[slot])
            books = (worker.backlog_ns, worker.num_decodes, worker.prefill_tokens)
            assert columns == books, (worker.info.worker_id, columns, books)
            assert self.arriving[slot] == worker.arriving_bytes
            assert (
                min(
                    *books,
                    worker.arriving_tokens,
                    worker.arriving_bytes + 1.0,
                    worker.kv_tokens,
                    worker.held_tokens,
                    worker.context_tokens,
                    worker.num_requests,
                )
                >= 0
            )
        assert sum(w is not None for w in self._by_slot) == len(self.workers)
