"""What a lossy KV codec does to a model: held-out loss, and greedy tokens, with KV through it.

Owns the procedure. Text runs through the model a block of tokens at a time; as soon as a block is
full it is replaced by what the codec gives back, so every later token attends to KV of the past
that went through the codec, and its own KV is computed from that. Does not know a codec: it is
handed a function of bytes in the host's memory, wherever the model runs. Whoever loads a model
calls it on a short probe, and `bench/codec.py` on the held-out files of the built-in model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import torch

from penstock.core.step import Observation
from penstock.engine.batch import Batch
from penstock.engine.observe import Observer
from penstock.kv.group import outside
from penstock.kv.selection import OBSERVED_TOKENS, snap_blocks, streaming_blocks

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.engine.model import LoadedModel

Bytes2D = npt.NDArray[np.uint8]
RoundTrip = Callable[[int, Bytes2D], None]
"""Replaces blocks `[num_blocks, block_bytes]` of a group by what a codec makes of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What is left of the KV of each text, as requests ask for it. The first `prompt_tokens`, whole
    blocks, are read with all there is and not judged; what comes after them sees the first block
    and the last `window` tokens alone, or with `select` about so many tokens of the prompt. 0: all.
    """

    prompt_tokens: int = 0
    window: int = 0
    select: int = 0


ALL: Final = Part()


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """How a model read some text: per predicted token its cost and what would have been said.

    nats    [n] float64, negative log likelihood of the token that really follows
    greedy  [n] int64, the most likely token
    """

    nats: npt.NDArray[np.float64]
    greedy: npt.NDArray[np.int64]

    @property
    def loss(self) -> float:
        """Mean nats a token."""
        return float(self.nats.mean())


@dataclass(frozen=True, slots=True)
class Quality:
    """What a codec costs a model."""

    loss: float
    exact_loss: float
    greedy_agreement: float
    """Share of the positions at which the most likely token is the same, 0 to 1."""
    loss_error: float = 0.0
    """Standard error of the relative increase, from the differences at single tokens."""

    @property
    def loss_increase(self) -> float:
        """Relative increase of the loss: 0.001 is 0.1 %. Noise may make it negative."""
        return self.loss / self.exact_loss - 1.0


def compare(exact: Reading, coded: Reading) -> Quality:
    """Set two readings of the same text against each other."""
    assert len(exact.nats) == len(coded.nats), (len(exact.nats), len(coded.nats))
    agreement = float((exact.greedy == coded.greedy).mean())
    differences = coded.nats - exact.nats
    spread = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    error = spread / len(differences) ** 0.5 / exact.loss
    return Quality(coded.loss, exact.loss, agreement, error)


def read_texts(
    model: LoadedModel,
    texts: Sequence[Sequence[int]],
    round_trip: RoundTrip | None = None,
    *,
    block_size: int,
    part: Part = ALL,
) -> Reading:
    """Let a model read texts, each for itself; without `round_trip` the KV stays as it is.

    A text is token ids of which all but the first are predicted; it has two at least, and no more
    than the model's context, and more than the `part` has prompt tokens.
    """
    readings = [_read(model, text, round_trip, block_size, part) for text in texts]
    return Reading(
        np.concatenate([reading.nats for reading in readings]),
        np.concatenate([reading.greedy for reading in readings]),
    )


def _read(
    model: LoadedModel,
    text: Sequence[int],
    round_trip: RoundTrip | None,
    block_size: int,
    part: Part,
) -> Reading:
    num_tokens = len(text) - 1
    assert 0 < num_tokens <= model.max_model_len, (num_tokens, model.max_model_len)
    assert part.prompt_tokens < num_tokens, (part, num_tokens)
    assert part.prompt_tokens % block_size == 0, (part, block_size)
    pools, device = _pools(model, num_tokens, block_size), model.device.torch_device
    run = model.forward.bind(model.kernels, pools)
    ids = torch.tensor(text, dtype=torch.int64)
    nats, greedy = [], []
    gaps: tuple[range, ...] = ()
    with torch.inference_mode():
        for start in range(0, num_tokens, block_size):
            end = min(start + block_size, num_tokens)
            if part.window and start >= part.prompt_tokens:
                gaps = _outside_window(start, block_size, part.window)
            elif part.select and start == part.prompt_tokens:
                gaps = _not_selected(model, pools, text[:start], part.select)
            logits = run(_batch(ids, start, end, pools, gaps).to(device)).cpu()
            costs = torch.nn.functional.cross_entropy(
                logits.double(), ids[start + 1 : end + 1], reduction="none"
            )
            if start >= part.prompt_tokens:
                nats.append(costs.numpy())
                greedy.append(logits.argmax(-1).numpy())
            if round_trip is not None and end - start == block_size:
                for group, pool in enumerate(pools):
                    block = pool[start // block_size].view(torch.uint8).view(1, -1)
                    here = block.cpu()  # itself, unless it is on a device
                    round_trip(group, here.numpy())
                    block.copy_(here)
    return Reading(np.concatenate(nats), np.concatenate(greedy))


def _pools(model: LoadedModel, num_tokens: int, block_size: int) -> tuple[Tensor, ...]:
    """Return a pool per group with room for one text."""
    layout = model.layout(block_size)
    inner = (2, block_size, layout.num_kv_heads, layout.head_dim)
    num_blocks, dtype = layout.num_blocks(num_tokens), getattr(torch, layout.dtype)
    return tuple(
        torch.zeros(
            (num_blocks, len(group.layers), *inner), dtype=dtype, device=model.device.torch_device
        )
        for group in layout.groups
    )


def _outside_window(start: int, block_size: int, window: int) -> tuple[range, ...]:
    """Return the blocks that tokens from `start` on do not see: the first one of them sees as far
    back as any.
    """
    front, recent = streaming_blocks(
        -(-(start + 1) // block_size), block_size=block_size, num_sinks=1, window=window
    )
    return (range(front.stop, recent.start),)


def _not_selected(
    model: LoadedModel, pools: tuple[Tensor, ...], prompt: Sequence[int], capacity_tokens: int
) -> tuple[range, ...]:
    """Return the blocks that the end of a prompt, which has been read, looks at least."""
    num_tokens, block_size = len(prompt), pools[0].shape[3]
    table = np.arange(-(-num_tokens // block_size), dtype=np.int32)
    first = num_tokens - OBSERVED_TOKENS
    seen = Observation(0, first, tuple(prompt[first:]))
    scores = Observer(model, pools).look(seen, table)
    return snap_blocks(scores, num_tokens, block_size=block_size, capacity_tokens=capacity_tokens)


def _batch(
    ids: Tensor, start: int, end: int, pools: Sequence[Tensor], gaps: tuple[range, ...]
) -> Batch:
    """Return the step that computes tokens `[start, end)` of one sequence and all their logits."""
    positions = torch.arange(start, end)
    block_size = pools[0].shape[3]
    num_blocks = -(-end // block_size)
    seen = outside(range(num_blocks), gaps)
    table = torch.tensor([seen], dtype=torch.int32)
    return Batch(
        token_ids=ids[start:end].contiguous(),
        positions=positions,
        # Block i of the pool holds block i of the text, so a slot's number is its position.
        slots=tuple(positions for _ in pools),
        query_start=torch.tensor([0, end - start], dtype=torch.int32),
        kv_len=torch.tensor([end - (num_blocks - len(seen)) * block_size], dtype=torch.int32),
        block_tables=tuple(table for _ in pools),
        logits_rows=torch.arange(end - start),
        max_query_len=end - start,
    )
