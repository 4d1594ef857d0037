"""`Arrival`: what a workload consists of, and the workloads that are made from a rule.

A prompt is a list of pieces, (name, count): `count` tokens that all are `name`. Equal pieces are
equal tokens, so prompts that begin with the same pieces share a prefix, and whole blocks of tokens
are made and hashed at the cost of a few objects. A session is an arrival with turns behind it: each
comes some time after the answer before it and repeats the whole conversation.

Read from files in `penstock/sim/traces.py`; arrivals come in order of time from either. Called by
`penstock/sim/choose.py` and benchmarks.
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

from penstock.core.types import NS_PER_S
from penstock.sim.modelled import TOKEN

Piece = tuple[int, int]
FIRST_NAME = TOKEN + 1
"""Names below are those that a model draws."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One more turn of a session: `new_tokens` of prompt, `gap_ns` after the last answer."""

    gap_ns: int
    new_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request to come, and the turns of its session that follow."""

    at_ns: int
    pieces: tuple[Piece, ...]
    output_tokens: int
    turns: tuple[Turn, ...] = ()

    @property
    def input_tokens(self) -> int:
        """Length of the prompt."""
        return sum(size for _, size in self.pieces)

    def prompt(self) -> tuple[int, ...]:
        """Return the prompt's tokens."""
        if len(self.pieces) == 1:
            name, size = self.pieces[0]
            return (name,) * size
        tokens: list[int] = []
        for name, size in self.pieces:
            tokens += [name] * size
        return tuple(tokens)

    def next_turn(self, answered_ns: int, name: int) -> "Arrival | None":
        """Return the next turn of the session, whose new tokens are called `name`, if any."""
        if not self.turns:
            return None
        turn = self.turns[0]
        pieces = (*self.pieces, (TOKEN, self.output_tokens), (name, turn.new_tokens))
        return Arrival(answered_ns + turn.gap_ns, pieces, turn.output_tokens, self.turns[1:])


Lengths = Callable[[random.Random], tuple[int, int]]
"""Draws prompt and output tokens of one request."""
Rate = Callable[[float], float]
"""Requests per second at a time in seconds."""


def arrival_times(
    rng: random.Random, rate: Rate, duration_s: float, *, cv: float = 1.0
) -> Iterator[float]:
    """Yield arrival times in seconds until `duration_s`.

    The gaps at rate 1 are gamma distributed with coefficient of variation `cv`: 1 is Poisson, more
    is burstier, 0 is a beat. Time passes faster where the rate is higher.
    """
    now_s, shape = 0.0, 1 / (cv * cv) if cv else math.inf
    while True:
        gap = rng.gammavariate(shape, 1 / shape) if cv else 1.0
        # The rate is taken as constant over slices short beside any change of it.
        while gap > 0:
            here = max(rate(now_s), 1e-9)
            slice_s = min(gap / here, 1.0)
            gap = gap - slice_s * here if slice_s < gap / here else 0.0
            now_s += slice_s
            if now_s >= duration_s:
                return
        yield now_s


def synthetic(
    rng: random.Random,
    lengths: Lengths,
    times_s: Iterator[float],
    *,
    shared_tokens: int = 0,
) -> Iterator[Arrival]:
    """Yield single requests; all begin with the same `shared_tokens` of system prompt."""
    shared = ((FIRST_NAME, shared_tokens),) if shared_tokens else ()
    for name, at_s in zip(count(FIRST_NAME + 1), times_s, strict=False):
        num_input, num_output = lengths(rng)
        own = (name, max(num_input - shared_tokens, 1))
        yield Arrival(int(at_s * NS_PER_S), (*shared, own), max(num_output, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionShape:
    """Conversations: mean numbers of turns, tokens and seconds between answer and next question."""

    turns: float = 5.0
    input_tokens: int = 600
    output_tokens: int = 250
    think_s: float = 20.0
    system_tokens: int = 500


def sessions(
    rng: random.Random, shape: SessionShape, times_s: Iterator[float]
) -> Iterator[Arrival]:
    """Yield the first turns of multi-turn sessions: geometric turns, lognormal lengths, exponential
    thinking. Agents are sessions with many turns, short answers and hardly any thinking.
    """
    for name, at_s in zip(count(FIRST_NAME + 1), times_s, strict=False):
        num_turns = 1
        while rng.random() > 1 / shape.turns:
            num_turns += 1
        drawn = [
            Turn(
                int(rng.expovariate(1 / shape.think_s) * NS_PER_S) if shape.think_s else 0,
                lognormal(rng, shape.input_tokens, 0.8),
                lognormal(rng, shape.output_tokens, 0.8),
            )
            for _ in range(num_turns)
        ]
        pieces = ((FIRST_NAME, shape.system_tokens), (name, drawn[0].new_tokens))
        yield Arrival(int(at_s * NS_PER_S), pieces, drawn[0].output_tokens, tuple(drawn[1:]))


def lognormal(rng: random.Random, mean: float, sigma: float) -> int:
    """Draw a length whose mean is `mean`; at least 1."""
    return max(1, int(rng.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma)))


def constant(rate: float) -> Rate:
    """Return the same rate at all times."""
    return lambda _: rate


def step(rate: float, at_s: float, factor: float) -> Rate:
    """Return a rate that changes once, by `factor`, and stays."""
    return lambda now_s: rate * (factor if now_s >= at_s else 1.0)


LONG_PROMPT, LONG_ANSWER = (6000, 120), (600, 1500)
"""Mean prompt and output tokens of the two kinds that loads swing between: summaries, reasoning."""


def phased(
    rng: random.Random, rate: float, duration_s: float, *, phase_s: float, busier: float, cv: float
) -> Iterator[Arrival]:
    """Yield long prompts with short answers for `phase_s`, then short prompts with long answers at
    `busier` times the rate for as long, and so on; `rate` is the mean of both.
    """

    def is_answering(now_s: float) -> bool:
        return int(now_s // phase_s) % 2 == 1

    first = 2 * rate / (1 + busier)

    def rate_at(now_s: float) -> float:
        return first * busier if is_answering(now_s) else first

    times_s = arrival_times(rng, rate_at, duration_s, cv=cv)
    for name, at_s in zip(count(FIRST_NAME), times_s, strict=False):
        num_input, num_output = LONG_ANSWER if is_answering(at_s) else LONG_PROMPT
        pieces = ((name, lognormal(rng, num_input, 0.5)),)
        yield Arrival(int(at_s * NS_PER_S), pieces, lognormal(rng, num_output, 0.5))


def swinging(
    rng: random.Random, rate: float, duration_s: float, *, period_s: float, cv: float = 1.0
) -> Iterator[Arrival]:
    """Yield requests of two kinds whose shares swing against each other with `period_s`.

    Long prompts with short answers at one end, short prompts with long answers at the other. Loads
    go up and down slowly, and a split in the middle is never far off.
    """

    def lengths_at(now_s: float) -> tuple[int, int]:
        is_long_prompt = rng.random() < 0.5 + 0.5 * math.sin(2 * math.pi * now_s / period_s)
        num_input, num_output = LONG_PROMPT if is_long_prompt else LONG_ANSWER
        return lognormal(rng, num_input, 0.5), lognormal(rng, num_output, 0.5)

    times_s = arrival_times(rng, constant(rate), duration_s, cv=cv)
    for name, at_s in zip(count(FIRST_NAME), times_s, strict=False):
        num_input, num_output = lengths_at(at_s)
        yield Arrival(int(at_s * NS_PER_S), ((name, num_input),), num_output)
