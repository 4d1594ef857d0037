"""Records which KV blocks decode steps attend to, and with how much of the attention's mass.

Attention is computed by the model's kernels as ever, and once more in torch for its weights
(`watching.py`). So recording is for studies: steps run operation by operation, and slowly. Lines
are what `penstock sim memory --accesses` reads (its format is in `penstock/sim/accesses.py`): for
each sequence that decodes, layer and KV head, the blocks by falling mass, up to `MASS_KEPT` of it.
The kernels themselves read every block that is visible; what a memory that chooses would have to
read, the mass tells.

`recorded_executor` composes this around a model, in a worker that was asked to.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import torch

from penstock.core.errors import StartupFailed
from penstock.core.types import GIB
from penstock.engine.executor import ModelExecutor
from penstock.engine.watching import WatchedKernels, attention_weights

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.core.step import Sampled, Step
    from penstock.engine.attention import AttentionSpec
    from penstock.engine.batch import Batch
    from penstock.engine.kernels import Kernels
    from penstock.engine.model import LoadedModel

MASS_KEPT: Final = 0.999
"""Blocks are written by falling mass until they hold so much of it."""
FILE_BYTES_MAX: Final = 4 * GIB
"""A file grows no further."""

log = logging.getLogger(__name__)


def block_mass(
    spec: AttentionSpec, query: Tensor, key_cache: Tensor, table: Tensor, length: int
) -> Tensor:
    """Return the share of the attention of one new token that each of its blocks gets.

    `query` is [num_heads, head_dim], `key_cache` [num_blocks, block_size, num_kv_heads, head_dim],
    `table` the blocks of the sequence, of which `length` slots are filled. The result is
    [num_kv_heads, ceil(length / block_size)] float32, the mean over the query heads of a KV head;
    rows sum to 1, or less where sinks take a part. Blocks behind the window get nothing.
    """
    weights = attention_weights(spec, query[None], key_cache, table, length)[:, 0]
    block_size = key_cache.shape[1]
    num_blocks = -(-length // block_size)
    mass = torch.zeros(spec.num_kv_heads, num_blocks * block_size)
    mass[:, :length] = weights.view(spec.num_kv_heads, -1, length).mean(1)
    return mass.view(spec.num_kv_heads, num_blocks, block_size).sum(-1)


class AccessLog:
    """A file of accesses, and which request each row of a step is.

    An executor is not told names; the list of a sequence's tokens stays the same object as long as
    the sequence is here, and its positions grow.
    """

    def __init__(self, path: Path) -> None:
        """Begin the file anew. Raises: `OSError`."""
        self._file = path.open("w", encoding="utf-8")
        self._num_bytes = 0
        self._step = -1
        self._requests: dict[int, str] = {}
        self._known: dict[int, tuple[str, int]] = {}
        self._num_requests = 0
        self._lines: list[str] = []

    @property
    def is_full(self) -> bool:
        """Tell whether nothing more is written."""
        return self._num_bytes >= FILE_BYTES_MAX

    def begin(self, step: Step) -> None:
        """Note which rows of a step decode, and for whom."""
        self._step += 1
        self._requests = {}
        for sample in step.samples:
            if step.num_new[sample.row] == 1:
                self._requests[sample.row] = self._name(id(sample.token_ids), sample.position)

    def _name(self, key: int, position: int) -> str:
        name, last = self._known.get(key, ("", position))
        if not name or position <= last:  # the object of one that is gone may be used again
            name = f"r{self._num_requests}"
            self._num_requests += 1
        self._known[key] = name, position
        return name

    def request(self, row: int) -> str | None:
        """Return whose row it is; None for one that does not decode in this step."""
        return self._requests.get(row)

    def describe(self, block_bytes: int) -> None:
        """Say how many bytes of keys and values a block of one KV head has, once."""
        if not self._num_bytes:
            self._lines.append(json.dumps({"block_bytes": block_bytes}))
            self._num_bytes = 1

    def note(self, layer: int, request: str, mass: Tensor) -> None:
        """Write down what `block_mass` gave."""
        ordered, blocks = mass.sort(dim=-1, descending=True, stable=True)
        totals = ordered.cumsum(-1)
        wanted = (totals < MASS_KEPT * totals[:, -1:]).sum(-1) + 1
        for group, count in enumerate(wanted.tolist()):
            line = {
                "step": self._step,
                "layer": layer,
                "group": group,
                "request": request,
                "blocks": blocks[group, :count].tolist(),
                "mass": [round(share, 5) for share in ordered[group, :count].tolist()],
            }
            self._lines.append(json.dumps(line, separators=(",", ":")))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def end(self) -> None:
        """Write what was noted in this step, whole lines at once."""
        if not self._lines:
            return
        text = "\n".join(self._lines) + "\n"
        self._lines = []
        self._num_bytes += len(text)
        self._file.write(text)
        self._file.flush()
        if self.is_full:
            log.warning(
                "%s has %d bytes: no more KV accesses are recorded", self._file.name, len(text)
            )


class _Recorder:
    """Writes down what the decode steps of a batch attend to, layer by layer."""

    def __init__(self, accesses: AccessLog) -> None:
        self._accesses = accesses
        self._batch: Batch | None = None
        self._layer = 0

    def note(self, spec: AttentionSpec, query: Tensor, key_cache: Tensor, batch: Batch) -> None:
        """Note one layer's attention."""
        if batch is not self._batch:
            self._batch, self._layer = batch, 0
        _, block_size, _, head_dim = key_cache.shape
        self._accesses.describe(2 * block_size * head_dim * key_cache.element_size())
        starts, lengths = batch.query_start.tolist(), batch.kv_len.tolist()
        for row, length in enumerate(lengths):
            request = self._accesses.request(row)
            if request is not None and not self._accesses.is_full:
                table = batch.block_tables[spec.group][row]
                mass = block_mass(spec, query[starts[row]], key_cache, table, length)
                self._accesses.note(self._layer, request, mass)
        self._layer += 1


class RecordedExecutor:
    """A `ModelExecutor` whose decode steps are written down."""

    def __init__(self, model: LoadedModel, pools: tuple[Tensor, ...], accesses: AccessLog) -> None:
        """Bind a model to its pools, as `ModelExecutor` does."""
        kernels = cast("Kernels", WatchedKernels(model.kernels, _Recorder(accesses).note))
        self._executor = ModelExecutor(replace(model, kernels=kernels), pools)
        self._accesses = accesses

    def execute(self, step: Step) -> tuple[Sampled, ...]:
        """Compute the step as `ModelExecutor` does, and write down what it attended to."""
        self._accesses.begin(step)
        sampled = self._executor.execute(step)
        self._accesses.end()
        return sampled


def recorded_executor(model: LoadedModel, path: str, pools: tuple[Tensor, ...]) -> RecordedExecutor:
    """Return an executor that writes to `path`, with the number of this process behind it.

    Raises: `StartupFailed` when the file cannot be written.
    """
    place = Path(f"{path}.{os.getpid()}").expanduser()
    try:
        return RecordedExecutor(model, pools, AccessLog(place))
    except OSError as error:
        raise StartupFailed(f"--record-kv-access: {place} cannot be written: {error}") from error
