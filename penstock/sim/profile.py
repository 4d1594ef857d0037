"""Hardware that a simulated worker runs on: step times, room for KV, and the shape of its blocks.

The numbers are those that the controller starts its predictions from (`control/profiles.py`): in a
simulation the world is exactly as that table says, unless a worker is made slower.

Called by `penstock/sim/fleet.py`; it knows no cluster and no request.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

import numpy as np

from penstock.control.profiles import KERNEL_TIMES
from penstock.core.block import KVGroup, KVLayout
from penstock.core.errors import BadRequest
from penstock.core.types import NS_PER_MS


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Coefficients of a step's time, in milliseconds and tokens.

    prefill  a + b * S + c * (S^2 + 2 * S * P)      S new tokens behind a prefix of P
    decode   d + e * batch + f * context_tokens
    """

    a: float
    b: float
    c: float
    d: float
    e: float
    f: float

    def duration_ns(self, new: int, quadratic: int, batch: int, context: int) -> float:
        """Return the time of a step that computes prompts and decodes together.

        `new` is the prompt tokens and `quadratic` their sum of S^2 + 2SP; `batch` and `context` are
        the sequences that want one token and their tokens. The weights are read once for both: of
        the two fixed parts d counts where there is a decode, else a.
        """
        fixed = self.d if batch else self.a
        prompts = self.b * new + self.c * quadratic
        return (fixed + prompts + self.e * batch + self.f * context) * NS_PER_MS


class Kind(NamedTuple):
    """What a step is like. `is_crowded`: a neighbour on its host was in a step when it began."""

    has_prefill: bool
    has_newcomer: bool
    """Whether it decodes what the step before did not (`Batches`); never, with a prompt in it."""
    is_crowded: bool
    size: int
    """Of its time, as `size_of` has it."""


class Batches:
    """Tells which of a worker's steps, in order, decode a sequence for the first time.

    A real engine has more to set up for such a step than for one that goes on with the same
    sequences: with a small model it may take twice as long.
    """

    def __init__(self) -> None:
        self._due: list[int] = []

    def has_newcomer(self, num_new: Sequence[int], num_computed: Sequence[int]) -> bool:
        """Take the next step in; entries are new and computed tokens of its sequences.

        A sequence goes on when the step before left off where it begins.
        """
        due = Counter(self._due)
        begins = [computed for new, computed in zip(num_new, num_computed, strict=True) if new == 1]
        self._due = [computed + 1 for computed in begins]
        return not Counter(begins) <= due


@dataclass(frozen=True, slots=True, eq=False)
class Spread:
    """How far real steps lay from their times, as ratios by kind in the order they were seen; of
    one that only decodes its time is bent first.

    Workers that share processors and memory slow each other down, and what takes a processor away
    for some milliseconds is much for a short step and little for a long one.
    """

    ratios: Mapping[Kind, tuple[float, ...]]
    bends: Mapping[int, float] = field(default_factory=dict)
    """What steps that only decode usually took, over their times, by their number of sequences, in
    rising order. Kernels change their ways with it, and no line goes through all of that.
    """

    def bend(self, batch: int) -> float:
        """Return the bend at a number of sequences: between those of the numbers beside it, beyond
        the last that of the last; 1 where there is none.
        """
        if not self.bends:
            return 1.0
        return float(np.interp(batch, list(self.bends), list(self.bends.values())))

    def like(self, kind: Kind) -> tuple[float, ...]:
        """Return the ratios of a kind, or of the nearest size of it; nothing when there is none.

        Where no newcomer was ever seen, one is like any other step.
        """
        alike = [other for other in self.ratios if other[:-1] == kind[:-1]]
        if alike:
            return self.ratios[min(alike, key=lambda other: abs(other.size - kind.size))]
        return self.like(kind._replace(has_newcomer=False)) if kind.has_newcomer else ()


def size_of(duration_ns: float) -> int:
    """Return the power of two that a duration lies below."""
    return int(duration_ns).bit_length()


@dataclass(frozen=True, slots=True)
class Hardware:
    """One worker's hardware: `tp` GPUs `gpu` that hold the model and `capacity_tokens` of KV.

    `num_blocks` is given, per KV group, where a real worker is meant, and `spread` where its steps
    are to be as uneven as they were: then each is drawn, and none is repeated.
    """

    gpu: str
    model: str
    tp: int
    capacity_tokens: int
    times: StepTimes
    num_blocks: tuple[int, ...] = ()
    spread: Spread | None = None

    @property
    def profile(self) -> str:
        """The name under which the controller knows it."""
        return f"{self.gpu}/{self.model}/tp{self.tp}"


_SHAPES: Final = {"llama3.1-8b": (32, 8, 128), "llama3.1-70b": (80, 8, 128)}
"""Layers, KV heads and head dimension of the models that there are profiles of."""
MODELS: Final = tuple(_SHAPES)


def find_hardware(gpu: str, model: str, tp: int | None = None) -> Hardware:
    """Return a profile; `tp` None takes the fewest GPUs that hold the model.

    Raises: `BadRequest` naming what there is.
    """
    of_model = [name.split("/") for name in KERNEL_TIMES if f"/{model}/" in name]
    found = [int(its[2][2:]) for its in of_model if its[0] == gpu.upper()]
    if tp in found or (tp is None and found):
        hardware = Hardware(gpu.upper(), model, tp or min(found), 0, StepTimes(0, 0, 0, 0, 0, 0))
        capacity_tokens, coefficients = KERNEL_TIMES[hardware.profile]
        return replace(hardware, capacity_tokens=capacity_tokens, times=StepTimes(*coefficients))
    there = [f"{its[0]}-{its[2]}" for its in of_model]
    what = gpu if tp is None else f"{gpu}-tp{tp}"
    known = ", ".join(there) if there else "none; models are " + ", ".join(MODELS)
    raise BadRequest(f"no profile of {model} on {what}; there are: {known}", "cluster")


def layout_of(model: str, block_size: int) -> KVLayout:
    """Return the shape of the model's KV blocks in bf16: what a transfer has to carry."""
    num_layers, num_kv_heads, head_dim = _SHAPES[model]
    groups = (KVGroup(tuple(range(num_layers))),)
    return KVLayout(model, groups, num_kv_heads, head_dim, block_size, "bfloat16")
