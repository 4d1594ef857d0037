"""Runs steps: the one place where what a worker decided meets the model.

Owns nothing but a model bound to KV pools; it keeps no state of requests, so any request may come
up in any step. Does not know threads or time. A worker process calls it from its executor thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.engine.batch import make_batch
from penstock.engine.sampler import sample

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.core.step import Sampled, Step
    from penstock.engine.model import LoadedModel


class ModelExecutor:
    """A loaded model and the KV pools of one worker."""

    def __init__(self, model: LoadedModel, pools: tuple[Tensor, ...]) -> None:
        """Bind a model to a pool per group, each as `penstock.core.block` draws it."""
        self._run = model.forward.bind(model.kernels, pools)
        self._block_size = pools[0].shape[3]
        self._eos_token_ids = model.eos_token_ids

    def execute(self, step: Step) -> tuple[Sampled, ...]:
        """Compute the step, write its KV, and return a token for each of its samples, in order."""
        logits = self._run(make_batch(step, self._block_size))
        if not step.samples:
            return ()
        return sample(logits.numpy(), step.samples, self._eos_token_ids)
