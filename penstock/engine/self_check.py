"""Holds what will serve a model against Hugging Face's own eager code, at every start.

Owns the probes, the comparison and its tolerance. A few random tokens go through both: through
Hugging Face at once, through ours in chunks, decodes and mixed batches over scattered blocks.
Windows are shortened on both sides so that a few tokens cross them, and one probe sits at the end
of the context, where a scaled rotary embedding differs from a plain one. `load_model` calls it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, Final

import torch

from penstock.engine.batch import Batch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from penstock.core.block import KVLayout
    from penstock.engine.kernels import Kernels
    from penstock.engine.model import Forward

TOLERANCE: Final = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 1e-1}
"""Largest admissible error of logits, as a share of their spread; see `measure_error`."""

_CPU: Final = torch.device("cpu")
_WINDOW: Final = 8
_SCHEDULE: Final = ((11, 0), (20, 0), (1, 5), (1, 6), (1, 1), (6, 1))
"""New tokens of the two probes in each step: chunks, decodes, and both in one batch."""
MIN_MODEL_LEN: Final = sum(first for first, _ in _SCHEDULE)


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """Token ids and positions, both `[n]` int64."""

    token_ids: Tensor
    positions: Tensor


def make_probes(
    vocab_size: int,
    max_model_len: int,
    *,
    is_rope_by_length: bool,
    device: torch.device = _CPU,
) -> list[Probe]:
    """Return one probe at the beginning of the context and one at its end, on the model's device.

    Where the rotary embedding depends on how long the sequence is, both are at the end: what serves
    the model uses the embedding of the full length throughout.
    """
    generator = torch.Generator().manual_seed(0)
    probes: list[Probe] = []
    for lengths in zip(*_SCHEDULE, strict=True):
        length = sum(lengths)
        is_at_end = bool(probes) or is_rope_by_length
        first = max_model_len - length if is_at_end else 0
        ids = torch.randint(vocab_size, (length,), generator=generator)
        positions = torch.arange(first, first + length)
        probes.append(Probe(ids.to(device), positions.to(device)))
    return probes


def reference_logits(
    model: PreTrainedModel, probes: Sequence[Probe], max_model_len: int
) -> list[Tensor]:
    """Return Hugging Face's logits `[n, vocab_size]` float32 of each probe, windows shortened."""
    forward: Any = model
    with torch.inference_mode(), _short_windows(model, max_model_len):
        return [
            forward(
                input_ids=probe.token_ids[None], position_ids=probe.positions[None], use_cache=False
            )
            .logits[0]
            .float()
            for probe in probes
        ]


def measure_error(
    forward: Forward,
    kernels: Kernels,
    layout: KVLayout,
    probes: Sequence[Probe],
    reference: Sequence[Tensor],
) -> float:
    """Return the error of the logits' rows, as a share of their spread; NaN counts as infinite.

    In float32 that is the worst row. In smaller types it is each probe's median row, the worse of
    the two: there, rounding sends a token of a mixture of experts to another expert now and then.
    """
    pools, tables = _scattered_blocks(layout, probes)
    run = forward.with_windows_below(_WINDOW).bind(kernels, pools)
    done = [0] * len(probes)
    errors: list[list[Tensor]] = [[] for _ in probes]
    for new in _SCHEDULE:
        batch = _make_batch(probes, tables, done, new, layout.block_size)
        rows = torch.split(run(batch), [count for count in new if count])
        for index, row in zip((i for i, count in enumerate(new) if count), rows, strict=True):
            wanted = reference[index][done[index] : done[index] + new[index]]
            spread = (wanted - wanted.mean(-1, keepdim=True)).norm(dim=-1)
            errors[index].append(((row - wanted).norm(dim=-1) / spread).nan_to_num(nan=inf))
        done = [before + count for before, count in zip(done, new, strict=True)]
    summary = torch.Tensor.max if layout.dtype == "float32" else torch.Tensor.median
    return max(float(summary(torch.cat(parts))) for parts in errors)


def _scattered_blocks(
    layout: KVLayout, probes: Sequence[Probe]
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Return a pool per group, and per group and probe a block table `[1, W]`, in no order."""
    counts = [layout.num_blocks(len(probe.token_ids)) for probe in probes]
    dtype = getattr(torch, layout.dtype)
    inner = (2, layout.block_size, layout.num_kv_heads, layout.head_dim)
    generator = torch.Generator().manual_seed(1)
    device = probes[0].token_ids.device
    pools, tables = [], []
    for group in layout.groups:
        num_blocks = sum(counts) + 1
        shape = (num_blocks, len(group.layers), *inner)
        pools.append(torch.full(shape, float("nan"), dtype=dtype, device=device))
        order = torch.randperm(num_blocks, generator=generator).int()
        tables.append(
            [
                torch.nn.functional.pad(part, (0, max(counts) - len(part)))[None]
                for part in torch.split(order[1:], counts)
            ]
        )
    return pools, tables


def _make_batch(
    probes: Sequence[Probe],
    tables: Sequence[Sequence[Tensor]],
    done: Sequence[int],
    new: Sequence[int],
    block_size: int,
) -> Batch:
    active = [index for index, count in enumerate(new) if count]
    spans = [(index, done[index], done[index] + new[index]) for index in active]
    counts = torch.tensor([0, *(new[index] for index in active)])
    device = probes[0].token_ids.device
    slots = []
    for group in tables:
        parts = []
        for index, start, end in spans:
            kv = torch.arange(start, end)
            parts.append(group[index][0][kv // block_size].long() * block_size + kv % block_size)
        slots.append(torch.cat(parts).to(device))
    return Batch(
        token_ids=torch.cat([probes[i].token_ids[start:end] for i, start, end in spans]),
        positions=torch.cat([probes[i].positions[start:end] for i, start, end in spans]),
        slots=tuple(slots),
        query_start=counts.cumsum(0).int().to(device),
        kv_len=torch.tensor([end for _, _, end in spans]).int().to(device),
        block_tables=tuple(
            torch.cat([group[index] for index in active]).to(device) for group in tables
        ),
        logits_rows=torch.arange(int(counts.sum()), device=device),
        max_query_len=int(counts.max()),
    )


@contextmanager
def _short_windows(model: PreTrainedModel, max_model_len: int) -> Iterator[None]:
    """Let a model's masks show no more than `_WINDOW` tokens on its sliding layers.

    Eager attention sees its window only in the mask, which is made from the config. A window that
    no sequence outgrows is none.
    """
    config: Any = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window is not None and window < max_model_len:
        config.sliding_window = min(window, _WINDOW)
    try:
        yield
    finally:
        if window is not None:
            config.sliding_window = window
