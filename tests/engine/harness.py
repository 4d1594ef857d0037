"""Runs requests through an executor as a worker would: paged, chunked, batched, blocks in no order.

A block that no row will see again is freed at once and poisoned with NaN, so that an attention back
end that looks behind a window or beyond a sequence cannot go unnoticed.
"""

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch

from penstock.core.request import SamplingParams
from penstock.core.step import Sampled, SampleRow, Step
from penstock.engine.device_executor import DeviceExecutor
from penstock.engine.executor import ModelExecutor
from penstock.engine.model import LoadedModel

GREEDY = SamplingParams(temperature=0.0, seed=0)


class Harness:
    """An executor over small pools, and the block tables that a worker would keep."""

    def __init__(
        self,
        model: LoadedModel,
        block_size: int = 16,
        seed: int = 0,
        make_executor: Callable[..., ModelExecutor | DeviceExecutor] = ModelExecutor,
    ) -> None:
        self._layout = model.layout(block_size)
        inner = (2, block_size, self._layout.num_kv_heads, self._layout.head_dim)
        self._pools = tuple(
            torch.full(
                (96, len(group.layers), *inner),
                float("nan"),
                dtype=getattr(torch, self._layout.dtype),
                device=model.device.torch_device,
            )
            for group in self._layout.groups
        )
        self.executor = make_executor(model, self._pools)
        rng = random.Random(seed)
        self._free = [rng.sample(range(96), 96) for _ in self._layout.groups]
        self._tokens: list[list[int]] = []
        self._prompt_tokens: list[int] = []
        self._params: list[SamplingParams] = []
        self._computed: list[int] = []
        self._tables: list[list[list[int | None]]] = []
        self.sampled: list[list[Sampled]] = []

    def add(
        self, prompt: Sequence[int], params: SamplingParams = GREEDY, output: Sequence[int] = ()
    ) -> int:
        """Take a request in, perhaps one that is under way; return its index."""
        self._tokens.append([*prompt, *output])
        self._prompt_tokens.append(len(prompt))
        self._params.append(params)
        self._computed.append(0)
        self._tables.append([[] for _ in self._layout.groups])
        self.sampled.append([])
        return len(self._tokens) - 1

    def outputs(self, index: int) -> list[int]:
        """Return the tokens generated so far."""
        return self._tokens[index][self._prompt_tokens[index] :]

    def step(self, new: dict[int, int]) -> None:
        """Run one step with so many new tokens of each request."""
        step = self._step(new)
        self._take(new, step, self.executor.execute(step))

    def rounds(self, indices: Sequence[int], repeats: int, wanted: int) -> None:
        """Decode in one step that may be repeated, and go on until so many rounds were taken in."""
        new = dict.fromkeys(indices, 1)
        step = self._step(new, repeats)
        taken: list[bool] = []
        for results, goes_on in self.executor.rounds(step, lambda: len(taken) < wanted):
            self._take(new, step, results)
            taken.append(goes_on)
        assert not any(taken[-1:])
        assert all(taken[:-1])

    def _step(self, new: dict[int, int], repeats: int = 1) -> Step:
        samples = []
        for row, (index, count) in enumerate(new.items()):
            tokens = self._tokens[index]
            self._reserve(index, self._computed[index] + count + repeats - 1)
            if self._computed[index] + count == len(tokens):
                samples.append(
                    SampleRow(
                        row, self._params[index], self._prompt_tokens[index], len(tokens), tokens
                    )
                )
        spans = [(i, self._computed[i], self._computed[i] + count) for i, count in new.items()]
        return Step(
            step_id=0,
            token_ids=np.array([t for i, a, b in spans for t in self._tokens[i][a:b]], np.int64),
            num_new=np.array(list(new.values()), np.int32),
            num_computed=np.array([start for _, start, _ in spans], np.int32),
            block_tables=tuple(self._table(group, list(new)) for group in range(len(self._free))),
            samples=tuple(samples),
            repeats=repeats,
        )

    def _take(self, new: dict[int, int], step: Step, results: Sequence[Sampled]) -> None:
        """Add what was sampled, and let go of what no row will see again."""
        indices = list(new)
        for sample, result in zip(step.samples, results, strict=True):
            self._tokens[indices[sample.row]].append(result.token_id)
            self.sampled[indices[sample.row]].append(result)
        for index, count in new.items():
            self._computed[index] += count
            self._free_behind_windows(index)

    def run(self, max_tokens: int, chunk: int | None = None) -> None:
        """Run all requests to `max_tokens` tokens each, together, prompts in chunks."""
        while True:
            new = {}
            for index, tokens in enumerate(self._tokens):
                if len(tokens) - self._prompt_tokens[index] < max_tokens:
                    left = len(tokens) - self._computed[index]
                    new[index] = min(left, chunk or left)
            if not new:
                return
            self.step(new)

    def _reserve(self, index: int, num_tokens: int) -> None:
        for group, table in enumerate(self._tables[index]):
            while len(table) < self._layout.num_blocks(num_tokens):
                table.append(self._free[group].pop())

    def _table(self, group: int, indices: list[int]) -> np.ndarray:
        tables = [self._tables[index][group] for index in indices]
        padded = np.zeros((len(tables), max(map(len, tables)) + 1), np.int32)
        for row, table in enumerate(tables):
            padded[row, : len(table)] = [block or 0 for block in table]
        return padded

    def _free_behind_windows(self, index: int) -> None:
        for group, table in enumerate(self._tables[index]):
            window = self._layout.groups[group].window
            if not window:
                continue
            # The next token, at position `computed`, sees positions above `computed - window`.
            dead = max(0, self._computed[index] - window + 1) // self._layout.block_size
            for entry, block in enumerate(table[:dead]):
                if block is not None:
                    self._pools[group][block].fill_(float("nan"))
                    self._free[group].insert(0, block)
                    table[entry] = None


def generate(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    chunk: int | None = None,
    params: SamplingParams = GREEDY,
    block_size: int = 16,
) -> list[list[int]]:
    """Continue prompts in one batch and return the new tokens of each."""
    harness = Harness(model, block_size)
    for prompt in prompts:
        harness.add(prompt, params)
    harness.run(max_tokens, chunk)
    return [harness.outputs(index) for index in range(len(prompts))]
