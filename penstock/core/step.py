"""One model step as plain data: what a worker asks of its executor, what comes back, and how long
it took.

The worker core builds it, the executor port runs it, neither keeps anything for the other: an
executor has no per-request state, so a request may appear on any worker at any step.
"""

import numpy as np
import numpy.typing as npt
from msgspec import Struct
from msgspec.structs import replace

from penstock.core.request import SamplingParams
from penstock.core.types import BlockId, WorkerId

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


class SampleRow(Struct, frozen=True):
    """One sequence that gets a new token in this step.

    `row` indexes the step's sequences. `token_ids` is the whole sequence, prompt first, and must
    not change while the step runs; it is read only when the parameters have penalties. `position`
    is the index that the sampled token will have.
    """

    row: int
    params: SamplingParams
    prompt_tokens: int
    position: int
    token_ids: list[int]


class Observation(Struct, frozen=True):
    """Whose blocks are to be chosen from: sequence `row` of the step, whose tokens at positions
    `[position, position + len(token_ids))` vote on the blocks before them.
    """

    row: int
    position: int
    token_ids: tuple[int, ...]


class Step(Struct, frozen=True):
    """A batch of S sequences with T new tokens in all.

    token_ids    [T] int64, the sequences' new tokens one after the other
    num_new      [S] int32, how many of them each sequence has
    num_computed [S] int32, tokens of each sequence whose KV is already in its blocks
    block_tables per group [S, W] int32; entry j holds tokens [j * block_size, (j + 1) *
                 block_size). Entries behind a sliding window or beyond the sequence are 0 and are
                 never read.
    samples      the sequences whose last new token is their last known one
    digests_of   per group, the blocks whose content is complete with this step: a digest is
                 taken of each when the step is over
    gaps         [G, 3] int32 or None: entries of tables that were let go of in the middle: the
                 sequence, the first of them and how many, ascending; attention goes on behind
                 them, and positions stay what they were. For models of one group
    observations sequences of whose blocks it is to be said, when the step is over, how much the
                 last tokens of a prompt look at each
    repeats      how often in a row it may be run, each time on the tokens just sampled; more than
                 once only when every sequence has one new token, is sampled and has blocks for
                 all. The executor may stop early. Where it does not report each round by itself,
                 no sequence can end before the last
    """

    step_id: int
    token_ids: Int64
    num_new: Int32
    num_computed: Int32
    block_tables: tuple[Int32, ...]
    samples: tuple[SampleRow, ...]
    digests_of: tuple[tuple[BlockId, ...], ...] = ()
    repeats: int = 1
    gaps: Int32 | None = None
    observations: tuple[Observation, ...] = ()


class TokenLogprobs(Struct, frozen=True, array_like=True):
    """Log probability of a sampled token and of the most likely alternatives, before temperature
    and filters.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampled(Struct, frozen=True, array_like=True):
    """What one `SampleRow` got."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class StepSample(Struct, frozen=True, array_like=True):
    """What one step had to do, and how long it took.

    `prefill_tokens` are new tokens of sequences that got more than one, `prefill_work` the sum over
    those of S^2 + 2 * S * P (S new tokens behind P). The others got one token each and look at
    `context_tokens` in all.
    """

    prefill_tokens: int
    prefill_work: int
    decodes: int
    context_tokens: int
    duration_ns: int


class PullSample(Struct, frozen=True, array_like=True):
    """How long one pull from `source` took."""

    source: WorkerId
    num_bytes: int
    num_spans: int
    duration_ns: int


def next_round(step: Step, sampled: tuple[Sampled, ...], block_size: int) -> Step:
    """Return what the round of a repeated step computes that follows one with these samples."""
    num_computed = step.num_computed + np.int32(1)
    full = np.flatnonzero((num_computed + 1) % block_size == 0)
    entries = num_computed[full] // block_size
    return replace(
        step,
        token_ids=np.array([sample.token_id for sample in sampled], np.int64),
        num_computed=num_computed,
        samples=tuple([replace(row, position=row.position + 1) for row in step.samples]),
        digests_of=tuple([tuple(table[full, entries].tolist()) for table in step.block_tables]),
        repeats=step.repeats - 1,
    )
