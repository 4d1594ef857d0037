"""`SimExecutor` takes the time a model would take, and `ChainModel` computes what a model's KV
would hold.

`ChainModel` is the smallest thing that depends on KV the way attention does: the KV of a token is
one number, a hash of the token and of the number before it, kept in the worker's blocks. The token
it samples is a hash of the last number and the seed. If any block of a sequence is stale, reused,
missing or swapped, every later token is wrong, which `expected_tokens` (the same function without
blocks) shows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from penstock.core.block import KVGroup, KVLayout
from penstock.core.events import StepDone
from penstock.core.request import Request
from penstock.core.step import Sampled, Step, next_round
from penstock.kv.group import outside
from penstock.kv.selection import snap_blocks
from penstock.sim.clock import SimClock
from penstock.transfer.digest import take_digests
from penstock.transfer.region import Bytes2D

VOCAB_SIZE = 1000
SCORES = 64
"""So many different scores a block may get: few, so that equal ones happen."""
_MASK = (1 << 64) - 1
Execute = Callable[[Step], tuple[Sampled, ...]]
Observe = Callable[[Step], tuple[tuple[float, ...], ...]]
MakeModel = Callable[[KVLayout, tuple[Bytes2D, ...]], Execute]
"""From a layout and a worker's pools, [num_blocks, block_bytes] each, to what runs its steps."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """Duration of a step: `base_ns + new tokens * token_ns + cached tokens * context_ns`."""

    base_ns: int = 500_000
    token_ns: int = 20_000
    context_ns: int = 20

    def duration_ns(self, step: Step) -> int:
        """Return how long the step takes."""
        new, computed = int(step.num_new.sum()), int(step.num_computed.sum())
        return self.base_ns + new * self.token_ns + computed * self.context_ns


class SimExecutor:
    """The executor port: calls `model` and answers after the time `cost` says.

    It takes digests of blocks in `pools`; none if there are none. A step that may be repeated is
    run in rounds, each under way before the one before it is heard of.
    """

    def __init__(
        self,
        clock: SimClock,
        cost: StepCost,
        model: Execute,
        pools: tuple[Bytes2D, ...],
        *,
        block_size: int = 1,
        observe: Observe = lambda _step: (),
    ) -> None:
        self._clock = clock
        self._pools = pools
        self._cost = cost
        self._model = model
        self._block_size = block_size
        self._observe = observe
        self._ended_step = 0

    def run(self, step: Step, done: Callable[[StepDone], None]) -> None:
        """Answer at the simulated time at which the step would be over."""
        self._round(step, done, goes_on=step.repeats > 1)

    def _round(self, step: Step, done: Callable[[StepDone], None], *, goes_on: bool) -> None:
        started_ns = self._clock.now_ns()
        finished_ns = started_ns + self._cost.duration_ns(step)

        def finish() -> None:
            # KV is written when the step ends, so a block freed too early is caught with another's
            # content in it.
            sampled = self._model(step)
            digests = zip(self._pools, step.digests_of, strict=bool(self._pools))
            done(
                StepDone(
                    step_id=step.step_id,
                    sampled=sampled,
                    digests=tuple(take_digests(pool, ids) for pool, ids in digests),
                    scores=self._observe(step),
                    started_ns=started_ns,
                    finished_ns=finished_ns,
                    goes_on=goes_on,
                )
            )
            if goes_on:
                # What follows the next round is launched when this one has been heard of.
                following = next_round(step, sampled, self._block_size)
                is_wanted = following.repeats > 1 and self._ended_step != step.step_id
                self._round(following, done, goes_on=is_wanted)

        self._clock.call_at(finished_ns, finish)

    def end(self, step_id: int) -> None:
        """Begin no more rounds of that step."""
        self._ended_step = step_id


def chain_layout(block_size: int, windows: tuple[int, ...] = (0,)) -> KVLayout:
    """Return a layout whose slot is exactly one 8-byte number: one layer, one head, one dimension,
    per group.
    """
    groups = tuple(KVGroup((layer,), window) for layer, window in enumerate(windows))
    return KVLayout("chain", groups, 1, 1, block_size, "float32")


class ChainModel:
    """A model whose KV is a hash chain: a number a slot, half of it the key, half the value."""

    def __init__(self, layout: KVLayout, pools: tuple[Bytes2D, ...]) -> None:
        self._layout = layout
        self._pools = [pool.view(np.uint32).reshape(-1, 2, layout.block_size) for pool in pools]

    def execute(self, step: Step) -> tuple[Sampled, ...]:
        """Fill the step's slots and sample its rows."""
        token_ids = step.token_ids.tolist()
        last: list[int] = []
        start = 0
        for row, (num_new, num_computed) in enumerate(
            zip(step.num_new.tolist(), step.num_computed.tolist(), strict=True)
        ):
            tables = [table[row] for table in step.block_tables]
            number = self._read(tables, num_computed)
            for offset in range(num_new):
                number = _link(number, token_ids[start + offset])
                self._write(tables, num_computed + offset, number)
            last.append(_seen(number, self._first_numbers(step, row, num_computed + num_new)))
            start += num_new
        return tuple(
            Sampled(_sample(last[s.row], s.params.seed or 0, s.position)) for s in step.samples
        )

    def _read(self, tables: list[npt.NDArray[np.int32]], num_computed: int) -> int:
        """Return the number of the last computed token; every group must agree on what its window
        shows.
        """
        if not num_computed:
            return 0
        position = num_computed - 1
        numbers = {self._slot(g, tables[g], position) for g in range(len(self._pools))}
        assert len(numbers) == 1, f"groups disagree at position {position}: {numbers}"
        for group, spec in enumerate(self._layout.groups):
            for back in range(
                max(0, num_computed + 1 - spec.window), position if spec.window else 0
            ):
                full = self._slot(0, tables[0], back)
                assert full == self._slot(group, tables[group], back), (group, back)
        return numbers.pop()

    def _first_numbers(self, step: Step, row: int, num_tokens: int) -> list[int]:
        """Return the first number of each block that a sequence with gaps still has; else none."""
        gaps = [] if step.gaps is None else step.gaps[step.gaps[:, 0] == row].tolist()
        if not gaps:
            return []
        size, table = self._layout.block_size, step.block_tables[0][row]
        let_go = [range(first, first + count) for _, first, count in gaps]
        entries = outside(range(-(-num_tokens // size)), let_go)
        return [self._slot(0, table, entry * size) for entry in entries]

    def observe(self, step: Step) -> tuple[tuple[float, ...], ...]:
        """Return how much attention each block gets in this model: what its first number says."""
        size = self._layout.block_size
        return tuple(
            tuple(
                _score(self._slot(0, step.block_tables[0][seen.row], start))
                for start in range(0, seen.position, size)
            )
            for seen in step.observations
        )

    def _slot(self, group: int, table: npt.NDArray[np.int32], position: int) -> int:
        block, offset = divmod(position, self._layout.block_size)
        low, high = self._pools[group][table[block], :, offset].tolist()
        return int(low | high << 32)

    def _write(self, tables: list[npt.NDArray[np.int32]], position: int, number: int) -> None:
        block, offset = divmod(position, self._layout.block_size)
        for pool, table in zip(self._pools, tables, strict=True):
            pool[table[block], :, offset] = number & 0xFFFFFFFF, number >> 32


def chain_scores(layout: KVLayout, pools: tuple[Bytes2D, ...]) -> Observe:
    """Make what observes a `ChainModel` over a worker's pools."""
    return ChainModel(layout, pools).observe


def chain_model(layout: KVLayout, pools: tuple[Bytes2D, ...]) -> Execute:
    """Make a `ChainModel` over a worker's pools."""
    return ChainModel(layout, pools).execute


def expected_tokens(
    request: Request, num_tokens: int, eos_token_ids: tuple[int, ...], *, block_size: int = 16
) -> list[int]:
    """Return what `ChainModel` must generate for `request`: `num_tokens` tokens, fewer if one of
    them ends it. The size of blocks matters where some of them are chosen (`kv_select`).
    """
    numbers: list[int] = []
    for token_id in request.prompt_token_ids:
        numbers.append(_link(numbers[-1] if numbers else 0, token_id))
    gaps: tuple[range, ...] = ()
    if 0 < request.kv_select < (num_prompt := len(numbers) - 1):
        scores = [_score(number) for number in numbers[:num_prompt:block_size]]
        capacity = request.kv_select
        gaps = snap_blocks(scores, num_prompt, block_size=block_size, capacity_tokens=capacity)
    output: list[int] = []
    while len(output) < num_tokens:
        firsts = numbers[::block_size] if gaps else []
        seen = _seen(numbers[-1], [firsts[entry] for entry in outside(range(len(firsts)), gaps)])
        token_id = _sample(seen, request.params.seed or 0, len(numbers))
        output.append(token_id)
        if token_id in eos_token_ids and not request.params.ignore_eos:
            break
        numbers.append(_link(numbers[-1], token_id))
    return output


def _seen(number: int, first_numbers: list[int]) -> int:
    """Mix what is left of a sequence with gaps into its last number: what is looked at matters."""
    for first in first_numbers:
        number = _link(number, first)
    return number


def _score(number: int) -> float:
    """Return what the last tokens think of a block that begins with this number."""
    return float(number % SCORES)


def _link(number: int, token_id: int) -> int:
    """Mix a token into the chain (the finaliser of splitmix64). Never 0, so that an unwritten slot
    is seen.
    """
    mixed = (number + (token_id + 1) * 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return (mixed ^ (mixed >> 31)) or 1


def _sample(number: int, seed: int, position: int) -> int:
    return _link(number ^ seed, position) % VOCAB_SIZE
