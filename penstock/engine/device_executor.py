"""Runs steps on a device: launches them, and reads their tokens when somebody asks.

Owns the device's rows that decode, the graphs over them, and what a step needs on the way there and
back. A step in which every sequence has one new token and is sampled replays a graph; any other is
launched operation by operation. Knows no requests, threads or time; a worker process calls it from
one thread. `ModelExecutor` is its counterpart for the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np
import torch

from penstock.core.request import SamplingParams
from penstock.core.step import Sampled, SampleRow, Step
from penstock.engine.batch import make_batch
from penstock.engine.decode_state import DecodeShape, DecodeState
from penstock.engine.graphs import DecodeGraphs, GraphKey
from penstock.engine.kernels.cuda import CudaKernels
from penstock.engine.sampler import is_plain_draw, sample
from penstock.engine.staging import Readback, Staging
from penstock.engine.triton.sample import SamplingRows, sample_rows, sample_space

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.engine.batch import Batch
    from penstock.engine.graphs import Capture, Run
    from penstock.engine.model import LoadedModel
    from penstock.engine.sampler import Int64

Result = TypeVar("Result")
_MASK: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Pending:
    """A step that has been launched. `tokens` waits for it; ask once."""

    tokens: Callable[[], tuple[Sampled, ...]]


class DeviceExecutor:
    """A loaded model and the KV pools of one worker, on the model's device."""

    def __init__(
        self,
        model: LoadedModel,
        pools: tuple[Tensor, ...],
        capture: Capture,
        *,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        """Bind a model to a pool per group, each as `penstock.core.block` draws it."""
        block_size = pools[0].shape[3]
        self._model, self._kernels = model, _triton_kernels(model)
        self._forward = model.forward.bind(model.kernels, pools)
        self._block_size = block_size
        fewest = min(len(pool) for pool in pools)
        self._capacity_tokens = min(max_model_len, fewest * block_size)
        self._staging, self._readback = Staging(model.device), Readback(model.device)
        self._graphs = DecodeGraphs(capture, self._decode, self._key, max_num_seqs)
        num_rows = self._graphs.sizes[-1]
        shape = DecodeShape(
            num_rows=num_rows,
            num_groups=len(pools),
            # One more than a sequence fills: a step's tables may have room for the next token.
            max_blocks=-(-max_model_len // block_size) + 1,
            block_size=block_size,
        )
        self._state = DecodeState(model.device, shape)
        device = model.device.torch_device
        self._space = sample_space(max(num_rows, max_num_seqs), model.vocab_size, device)
        # Graphs leave their logits here: for rows that are sampled on the host.
        self._logits = torch.zeros(num_rows, model.vocab_size, device=device)
        self.num_rows_sent = 0
        """Rows of decoding steps that had to be sent to the device, since the start."""

    def warm_up(self, prompt_tokens: Sequence[int] = ()) -> None:
        """Capture every graph, and run prompts of so many tokens, which compiles their kernels.

        While no row is live and no block has anything of use: prompts are written to the first
        ones, as far as those go.
        """
        with torch.inference_mode():
            self._graphs.warm_up()
        for count in prompt_tokens:
            self.execute(self._prompt(min(count, self._capacity_tokens)))

    def _prompt(self, num_tokens: int) -> Step:
        num_blocks = -(-num_tokens // self._block_size)
        table = np.arange(num_blocks, dtype=np.int32)[None]
        return Step(
            step_id=0,
            token_ids=np.zeros(num_tokens, np.int64),
            num_new=np.array([num_tokens], np.int32),
            num_computed=np.zeros(1, np.int32),
            block_tables=(table,) * self._state.shape.num_groups,
            samples=(SampleRow(0, SamplingParams(seed=0), num_tokens, num_tokens, []),),
        )

    def prepare(self) -> None:
        """Make the calling thread one that may run steps."""
        device = self._model.device
        if device.is_cuda:
            torch.cuda.set_device(device.torch_device)

    def beside(self, act: Callable[[Step], Result]) -> Callable[[Step], Result]:
        """Return the same act on a stream that does not wait for rounds which run ahead.

        For what is done with a step whose tokens were read: all that it wrote is there.
        """
        device = self._model.device
        if not device.is_cuda:
            return act
        stream = torch.cuda.Stream(device.torch_device)  # type: ignore[no-untyped-call]

        def aside(step: Step) -> Result:
            with torch.cuda.stream(stream):
                return act(step)

        return aside

    def execute(self, step: Step) -> tuple[Sampled, ...]:
        """Compute the step, write its KV, and return a token for each of its samples, in order."""
        return self.launch(step).tokens()

    def launch(self, step: Step) -> Pending:
        """Start the step and return; a step before it must have been waited for."""
        with torch.inference_mode():
            num_rows = self._graphs.rows_for(len(step.num_new)) if _is_decode(step) else None
            if num_rows is None:
                return self._launch_batch(step)
            self.num_rows_sent += self._state.update(step, num_rows, self._staging)
            return self._replay(step, num_rows)

    def rounds(
        self, step: Step, is_wanted: Callable[[], bool]
    ) -> Iterator[tuple[tuple[Sampled, ...], bool]]:
        """Run a step up to `step.repeats` times in a row, each on the tokens just sampled.

        Yields what a round has sampled and whether another one is under way, which then was
        launched before these tokens were waited for. Steps that are not replayed, or are sampled on
        the host in part, are run once.
        """
        pending = self.launch(step)
        num_rows = self._graphs.rows_for(len(step.num_new)) if _is_decode(step) else None
        if num_rows is not None and all(is_plain_draw(sample) for sample in step.samples):
            for _ in range(step.repeats - 1):
                if not is_wanted():
                    break
                with torch.inference_mode():
                    ahead = self._replay(step, num_rows)
                yield pending.tokens(), True
                pending = ahead
        yield pending.tokens(), False

    def logits(self, num_rows: int) -> Tensor:
        """Return the logits `[num_rows, vocab_size]` float32 of the last replayed step, a view."""
        return self._logits[:num_rows]

    # -------------------------------------------------------------------------- replayed decoding

    def _replay(self, step: Step, num_rows: int) -> Pending:
        """Run the graph for so many rows, and have its tokens brought back."""
        self._graphs.get(num_rows)()
        count = len(step.num_new)
        logits = self._host_logits(self._logits, step.samples)
        read = self._readback.fetch([self._state.sampled[:count], *logits.values()])

        def tokens() -> tuple[Sampled, ...]:
            sampled, *rows = read()
            self._state.note_advanced(sampled)
            return self._sampled(step, sampled, dict(zip(logits, rows, strict=True)))

        return Pending(tokens)

    def _decode(self, num_rows: int) -> Run:
        """Return what computes a token for the first rows and makes it their next one."""
        state = self._state
        batch, sampled = state.batch(num_rows), state.sampled[:num_rows]
        how = _first_rows(state.rows.sampling, num_rows)

        def run() -> None:
            logits = self._forward(batch)
            self._logits[:num_rows].copy_(logits)
            sample_rows(logits, how, self._space, sampled)
            state.advance(num_rows)

        return run

    def _key(self, num_rows: int) -> GraphKey:
        attention = self._model.forward.attention
        splits = {self._kernels.num_splits(spec, num_rows) for spec in attention}
        return GraphKey(num_rows, tuple(sorted(splits)))

    # ------------------------------------------------------------------------------- other batches

    def _launch_batch(self, step: Step) -> Pending:
        """Run a batch with chunks of prompts in it."""
        batch, how = self._send(step)
        logits = self._forward(batch)
        if not step.samples:
            end = self._readback.fetch([])

            def finish() -> tuple[Sampled, ...]:
                end()
                return ()

            return Pending(finish)
        tokens = torch.empty(len(step.samples), dtype=torch.int64, device=logits.device)
        sample_rows(logits, how, self._space, tokens)
        kept = self._host_logits(logits, step.samples)
        fetched = self._readback.fetch([tokens, *kept.values()])

        def wait() -> tuple[Sampled, ...]:
            sampled, *rows = fetched()
            return self._sampled(step, sampled, dict(zip(kept, rows, strict=True)))

        return Pending(wait)

    def _send(self, step: Step) -> tuple[Batch, SamplingRows]:
        """Return the step on the device, brought there in one copy."""
        batch = make_batch(step, self._block_size)
        here = [*batch.tensors(), *_sampling_columns(step.samples)]
        there = self._staging.send(here)
        how = SamplingRows(*there[-_NUM_COLUMNS:])
        return batch.with_tensors(there[:-_NUM_COLUMNS]), how

    # ------------------------------------------------------------------------------- what comes out

    def _host_logits(self, logits: Tensor, samples: tuple[SampleRow, ...]) -> dict[int, Tensor]:
        """Return the logits of the samples that only the CPU sampler knows how to do."""
        return {index: logits[index] for index, row in enumerate(samples) if not is_plain_draw(row)}

    def _sampled(
        self, step: Step, tokens: Int64, logits: dict[int, np.ndarray]
    ) -> tuple[Sampled, ...]:
        """Return what each sample got: from the device, or by its logits."""
        assert tokens.min(initial=0) >= 0, "the model computed NaN"
        sampled = [Sampled(token) for token in tokens.tolist()]
        if logits:
            rows = [step.samples[index] for index in logits]
            drawn = sample(np.stack(list(logits.values())), rows, self._model.eos_token_ids)
            for index, result in zip(logits, drawn, strict=True):
                sampled[index] = result
        return tuple(sampled)


def _is_decode(step: Step) -> bool:
    """Tell whether every sequence has one new token and gets the next, with all its blocks."""
    is_whole = step.gaps is None
    return is_whole and len(step.token_ids) == len(step.num_new) == len(step.samples)


def _triton_kernels(model: LoadedModel) -> CudaKernels:
    assert isinstance(model.kernels, CudaKernels), model.kernels.name
    return model.kernels


def _first_rows(how: SamplingRows, count: int) -> SamplingRows:
    return SamplingRows(
        how.temperature[:count],
        how.min_p[:count],
        how.top_p[:count],
        how.top_k[:count],
        how.seeds[:count],
        how.positions[:count],
    )


_NUM_COLUMNS: Final = 6


def _sampling_columns(samples: tuple[SampleRow, ...]) -> list[Tensor]:
    """Return the columns of `SamplingRows` for a step's samples."""
    params = [row.params for row in samples]
    seeds = []
    for p in params:
        assert p.seed is not None, "the front end gives every request a seed"
        seeds.append(p.seed & _MASK)
    columns = (
        np.array([p.temperature for p in params], np.float32),
        np.array([p.min_p for p in params], np.float32),
        np.array([p.top_p for p in params], np.float64),
        np.array([max(0, p.top_k) for p in params], np.int32),
        np.array(seeds, np.uint64).view(np.int64),
        np.array([row.position - 1 for row in samples], np.int64),
    )
    return [torch.from_numpy(column) for column in columns]
