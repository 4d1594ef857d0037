"""`Scheduler` chooses what the next step computes: one token budget, continuous batching, no
phases.

A sequence takes part until its computed tokens have caught up with its tokens; whether that is a
prompt's chunk or one decode token makes no difference but for the order: sequences that need a
single token go first, so that a long prompt cannot stall them; what is left of the budget goes to
prompts, oldest first. When blocks run out the youngest running sequence is preempted by
recomputation: its blocks are dropped (named ones stay as prefix cache) and it waits at the front of
the line.

Called by `Worker`; never while a step is under way, so blocks that a step writes are never taken
from it.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from penstock.core.config import WorkerConfig
from penstock.core.events import Command, EndStep
from penstock.core.step import Int32, Observation, Sampled, SampleRow, Step, next_round
from penstock.core.types import BlockId
from penstock.kv.cache import KVCache
from penstock.kv.selection import snap_blocks
from penstock.worker.sequence import Sequence, SequenceState


@dataclass(frozen=True, slots=True)
class Plan:
    """A step and whose it is: `parts[i]` is its sequence i and how many new tokens that gets."""

    step: Step
    parts: tuple[tuple[Sequence, int], ...]

    @property
    def leaving(self) -> list[Sequence]:
        """Those of its sequences that run and are to go on elsewhere."""
        sequences = (sequence for sequence, _ in self.parts if sequence.decode_worker)
        return [s for s in sequences if s.state is SequenceState.RUNNING]

    def followed(self, sampled: tuple[Sampled, ...], block_size: int) -> "Plan":
        """Return the next round of a step that goes on."""
        return Plan(next_round(self.step, sampled, block_size), self.parts)

    def select(self, kv: KVCache, scores: tuple[tuple[float, ...], ...], block_size: int) -> None:
        """Let go of what is not to be kept of the sequences that were observed, and still run."""
        for observation, found in zip(self.step.observations, scores, strict=True):
            sequence = self.parts[observation.row][0]
            if sequence.state is not SequenceState.RUNNING:
                continue
            gaps = snap_blocks(
                found,
                sequence.select_end,
                block_size=block_size,
                capacity_tokens=sequence.request.kv_select,
            )
            kv.let_go(sequence.request_id, gaps)
            sequence.is_selected = True
            num_let_go = block_size * sum(map(len, gaps))
            sequence.timeline.selected_tokens = sequence.select_end - num_let_go

    def run_ahead(
        self, sampled: tuple[Sampled, ...]
    ) -> list[tuple[Sequence, tuple[int, ...], Sampled]]:
        """Take in all rounds but the last of a step that was run several times at one go.

        Returns, for each sample, whose it is, the tokens of those rounds and what it got in the
        last. None of them can end a sequence.
        """
        samples = self.step.samples
        drawn = []
        for i, sample in enumerate(samples):
            *before, last = sampled[i :: len(samples)]
            ahead = tuple(s.token_id for s in before)
            sequence = self.parts[sample.row][0]
            sequence.tokens += ahead
            sequence.num_computed += len(ahead)
            drawn.append((sequence, ahead, last))
        return drawn


class Scheduler:
    """Owns who waits and who runs on this worker."""

    def __init__(self, config: WorkerConfig, kv: KVCache) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preempted = 0
        self.num_steps = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._ended_step = 0
        self._config = config
        self._kv = kv

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence in the line, before those that came after it while it waited for
        blocks out of a tier; not before one that was preempted.
        """
        at, waiting = len(self.waiting), self.waiting
        while (
            at and waiting[at - 1].arrival > sequence.arrival and not waiting[at - 1].is_preempted
        ):
            at -= 1
        waiting.insert(at, sequence)

    def add_first(self, sequence: Sequence) -> None:
        """Put a sequence whose KV has to be computed again at the front of the line."""
        self.waiting.appendleft(sequence)

    def start(self, sequence: Sequence) -> None:
        """Let a sequence that already has its blocks take part from the next step on. Keeps arrival
        order.
        """
        sequence.move_to(SequenceState.RUNNING)
        self.running.append(sequence)
        self.running.sort(key=_arrival)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of whichever line it is in."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def stamp_started(self, now_ns: int) -> list[Sequence]:
        """Note who runs for the first time; return those whose prefill the cache made complete
        without a step.
        """
        ready = []
        for sequence in self.running:
            if not sequence.timeline.prefill_started_ns:
                sequence.timeline.prefill_started_ns = now_ns
            if sequence.decode_worker and sequence.num_computed == sequence.target_tokens:
                ready.append(sequence)
        return ready

    def last_pinned(self) -> Sequence | None:
        """Return the youngest running sequence that a peer reads, if there is any.

        With no step to run, that is one that wants room and holds what others want.
        """
        pinned = (sequence for sequence in self.running if sequence.is_pinned)
        return max(pinned, key=_arrival, default=None)

    def schedule(self) -> Plan | None:
        """Return the next step, or None when nothing can run.

        Admits waiting sequences, preempts if it must.
        """
        budget_tokens = self._config.max_num_batched_tokens
        parts: list[tuple[Sequence, int]] = []
        preempted_before = self.num_preempted
        for sequence, want in self._in_turn():
            num_new = min(want, budget_tokens)
            if num_new and self._make_room(sequence, num_new, parts):
                parts.append((sequence, num_new))
                budget_tokens -= num_new
        if self.num_preempted == preempted_before:
            self._admit(parts, budget_tokens)
        return self._plan(parts) if parts else None

    def _in_turn(self) -> list[tuple[Sequence, int]]:
        """Return who wants how many tokens: those that want a single one first, then chunks, each
        in order of arrival.
        """
        ones, chunks = [], []
        for sequence in self.running:
            if sequence.target_tokens - sequence.num_computed > 1 and not sequence.is_selected:
                self._take_up(sequence)
            want = sequence.chunk_tokens
            if want == 1:
                ones.append((sequence, 1))
            elif want > 1:
                chunks.append((sequence, want))
        return ones + chunks

    def _make_room(
        self, sequence: Sequence, num_new: int, parts: list[tuple[Sequence, int]]
    ) -> bool:
        """Give `sequence` slots for its new tokens, at the cost of younger ones that are not in the
        step yet.
        """
        if sequence.state is not SequenceState.RUNNING:
            return False  # preempted since its turn was noted
        if sequence.num_computed + num_new <= sequence.capacity_tokens:
            return True
        while not self._grow(sequence, sequence.num_computed + num_new):
            scheduled = {id(part) for part, _ in parts}
            candidates = [s for s in self.running if id(s) not in scheduled and not s.is_pinned]
            if not candidates:
                return False  # what is left is being read by peers
            victim = max(candidates, key=_arrival)
            if victim is sequence and not parts and len(candidates) == 1:
                return False  # alone and stuck: offers or pulls hold what it needs
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        if num_tokens <= sequence.capacity_tokens:
            return True
        if not self._kv.grow(sequence.request_id, num_tokens):
            return False
        sequence.capacity_tokens = self._kv.capacity(sequence.request_id)
        return True

    def _preempt(self, victim: Sequence) -> None:
        self.num_preempted += 1
        self.running.remove(victim)
        self._kv.close(victim.request_id)
        victim.lose_blocks()
        victim.is_preempted = True
        victim.move_to(SequenceState.WAITING)
        self.add_first(victim)

    def _admit(self, parts: list[tuple[Sequence, int]], budget_tokens: int) -> None:
        """Start waiting sequences while budget, seats and blocks last; strictly in line."""
        while self.waiting and budget_tokens and len(self.running) < self._config.max_num_seqs:
            sequence = self.waiting[0]
            num_cached = self._open(sequence)
            num_new = min(sequence.chunk_tokens, budget_tokens)
            if not self._grow(sequence, num_cached + num_new):
                self._kv.close(sequence.request_id)
                sequence.lose_blocks()
                return
            # Room for the whole prompt now, if there is any, so that its chunks lie in one run.
            own_tokens = sequence.coming_from or sequence.target_tokens
            self._kv.reserve(sequence.request_id, own_tokens)
            self.waiting.popleft()
            self.prefix_queries += sequence.target_tokens
            self.prefix_hits += num_cached
            if not sequence.is_preempted:
                sequence.timeline.cached_tokens = num_cached
            self.start(sequence)
            if num_new:
                parts.append((sequence, num_new))
                budget_tokens -= num_new

    def _take_up(self, sequence: Sequence) -> None:
        """Skip what has come into the cache since the sequence was opened: out of a tier, or
        computed for another one.
        """
        before, limit = sequence.num_computed, _limit(sequence)
        known = self._kv.take_up(sequence.request_id, sequence.hashes, before, limit)
        if known == before:
            return
        sequence.num_computed = known
        sequence.capacity_tokens = self._kv.capacity(sequence.request_id)
        self.prefix_hits += known - before
        if not sequence.is_preempted:
            sequence.timeline.cached_tokens += known - before

    def _open(self, sequence: Sequence) -> int:
        """Take the longest cached prefix."""
        if self._config.is_prefix_caching:
            sequence.name_blocks(self._config.layout.block_size)
        limit = _limit(sequence)
        num_cached = self._kv.open(sequence.request_id, sequence.hashes, limit)
        sequence.num_computed = num_cached
        sequence.capacity_tokens = self._kv.capacity(sequence.request_id)
        return num_cached

    def _plan(self, parts: list[tuple[Sequence, int]]) -> Plan:
        token_ids: list[int] = []
        samples: list[SampleRow] = []
        observations: list[Observation] = []
        for row, (sequence, num_new) in enumerate(parts):
            start, end = sequence.num_computed, sequence.num_computed + num_new
            token_ids += sequence.tokens[start:end]
            if (observation := sequence.observation(row, end)) is not None:
                observations.append(observation)
            if end == len(sequence.tokens):
                samples.append(
                    SampleRow(
                        row, sequence.request.params, sequence.num_prompt, end, sequence.tokens
                    )
                )
        repeats = self._repeats(parts)
        num_computed = [sequence.num_computed for sequence, _ in parts]
        num_new_tokens = [num_new for _, num_new in parts]
        self.num_steps += 1
        request_ids = [sequence.request_id for sequence, _ in parts]
        block_tables = self._kv.tables(
            request_ids,
            max(map(int.__add__, num_computed, num_new_tokens)) + repeats - 1,
        )
        step = Step(
            step_id=self.num_steps,
            token_ids=np.array(token_ids, dtype=np.int64),
            num_new=np.array(num_new_tokens, dtype=np.int32),
            num_computed=np.array(num_computed, dtype=np.int32),
            block_tables=block_tables,
            samples=tuple(samples),
            digests_of=self._completed(parts, block_tables),
            repeats=repeats,
            gaps=self._kv.gaps(request_ids),
            observations=tuple(observations),
        )
        return Plan(step, tuple(parts))

    def _repeats(self, parts: list[tuple[Sequence, int]]) -> int:
        """Return how often the step may be run in a row: until the first sequence ends, and once
        where another step could differ in more than its tokens.
        """
        has_rounds = self._config.max_rounds > 1
        most = max(self._config.max_repeats, self._config.max_rounds)
        if most == 1 or self.waiting or (has_rounds and len(parts) < len(self.running)):
            return 1
        for sequence, _ in parts:
            wants_one = len(sequence.tokens) - sequence.num_computed == 1
            # Of a sequence whose blocks are chosen from now, the next step has others.
            wants_one &= not sequence.is_to_select
            # What a round samples may end a sequence where rounds are reported one by one.
            is_free = has_rounds or (not sequence.stop_ids and sequence.is_first_token_out)
            # A window moves between rounds, and blocks that it lets go are somebody's at once.
            if not (wants_one and is_free) or sequence.request.kv_window:
                return 1
            most = min(most, sequence.tokens_max - len(sequence.tokens))
        has_room = all(self._grow(s, s.num_computed + most) for s, _ in parts)
        return most if has_room else 1

    def end_if_outdated(self, plan: Plan | None, is_leaving: bool) -> list[Command]:
        """End a step whose rounds to come should make way for another: somebody came or wants to
        leave, or one of its sequences is to be computed no more. Once for each step.
        """
        if self._config.max_rounds == 1 or plan is None or plan.step.repeats == 1:
            return []
        is_changed = is_leaving or bool(self.waiting) or len(self.running) != len(plan.parts)
        left = (sequence.state is not SequenceState.RUNNING for sequence, _ in plan.parts)
        if plan.step.step_id == self._ended_step or not (is_changed or any(left)):
            return []
        self._ended_step = plan.step.step_id
        return [EndStep(plan.step.step_id)]

    def _completed(
        self, parts: list[tuple[Sequence, int]], block_tables: tuple[Int32, ...]
    ) -> tuple[tuple[BlockId, ...], ...]:
        """Return the blocks, per group, that are complete after the step: full ones, and the last
        one of a sequence that is handed off then.
        """
        size = self._config.layout.block_size
        entries: list[tuple[int, int]] = []
        for row, (sequence, num_new) in enumerate(parts):
            begin, end = sequence.num_computed, sequence.num_computed + num_new
            first, stop = begin // size, end // size
            if sequence.num_left_over and end == sequence.target_tokens:
                stop = -(-end // size)
            if first < stop:
                entries += [(row, entry) for entry in range(first, stop)]
        if not entries:
            return ((),) * len(block_tables)
        rows, columns = zip(*entries, strict=True)
        return tuple(tuple(table[rows, columns].tolist()) for table in block_tables)


def _limit(sequence: Sequence) -> int:
    """Return how many tokens need not be computed at most: one is, if we are to sample, or to
    choose from the blocks.
    """
    limit = sequence.target_tokens - (sequence.decode_worker is None)
    return min(limit, sequence.select_end - 1) if sequence.select_end else limit


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
