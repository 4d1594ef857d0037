"""Paged attention: right against float64, then by batch and context beside what memory and matrix
units allow, in the block-major pool and a layer-major one, and beside FlashInfer and FA3.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch

from h200.lab import Absent, Lab, Measure, Target, Wrong
from penstock.engine.attention import AttentionSpec
from penstock.engine.triton.paged_attention import (
    Sequences,
    SplitSpace,
    decode_splits,
    paged_attention,
)

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 32
LAYERS = 4
"""Layers of the pool: enough that one layer is a stride and not the whole."""
BATCHES = 1, 8, 32, 128, 256
CONTEXTS = 1024, 4096, 32768
PREFILLS = 512, 2048, 8192, 32768
SLOTS_MAX = 1 << 20
"""Slots of a batch: 2 GiB of a layer's keys and values."""
PROCESSORS = 132
DECODE_SHARE = 0.75
LAYOUT_SHARE = 0.97


@dataclass(frozen=True)
class Case:
    """Sequences of one length in a pool, `new` of whose last slots are this step's rows."""

    spec: AttentionSpec
    query: torch.Tensor
    cache: tuple[torch.Tensor, torch.Tensor]
    sequences: Sequences
    splits: SplitSpace | None

    def run(self, output: torch.Tensor) -> None:
        """Launch."""
        paged_attention(
            self.spec, self.query, self.cache, self.sequences, output, splits=self.splits
        )


def make_case(
    lab: Lab, batch: int, context: int, new: int, *, is_block_major: bool = True, layer: int = 1
) -> Case:
    """Return sequences in blocks at random places."""
    heads, kv_heads, head_dim = lab.pick((HEADS, KV_HEADS, HEAD_DIM), (4, 2, 32))
    width = -(-context // BLOCK_SIZE)
    num_blocks = batch * width
    shape = BLOCK_SIZE, kv_heads, head_dim
    if is_block_major:
        pool = lab.normal(num_blocks, LAYERS, 2, *shape)
        cache = pool[:, layer, 0], pool[:, layer, 1]
    else:
        pool = lab.normal(LAYERS, 2, num_blocks, *shape)
        cache = pool[layer, 0], pool[layer, 1]
    table = torch.randperm(num_blocks, device=lab.device).int().view(batch, width)
    starts = torch.arange(batch + 1, device=lab.device, dtype=torch.int32) * new
    lengths = torch.full((batch,), context, device=lab.device, dtype=torch.int32)
    query = lab.normal(batch * new, heads, head_dim)
    spec = AttentionSpec(0, layer, heads, kv_heads, head_dim, head_dim**-0.5)
    splits, num_splits = (
        None,
        decode_splits(batch, kv_heads, lab.pick(PROCESSORS, 4)) if new == 1 else 1,
    )
    if num_splits > 1:
        parts = torch.empty(num_splits, batch, heads, head_dim, device=lab.device)
        splits = SplitSpace(parts, parts.new_empty(num_splits, batch, heads))
    return Case(spec, query, cache, Sequences(starts, lengths, table, batch * new, new), splits)


def check(lab: Lab) -> None:
    """Compare with dense attention in float64."""
    worst = 0.0
    for batch, context, new in ((2, 65, 1), (1, 97, 40)):
        case = make_case(lab, batch, context, new)
        output = torch.full_like(case.query, float("nan"))
        case.run(output)
        worst = max(worst, (output.double() - dense(case, context, new)).abs().max().item())
        if not worst < 2e-2:
            raise Wrong(f"attention of {batch} sequences is {worst} off")
    lab.add("attention_error", [worst], "largest difference")


def dense(case: Case, context: int, new: int) -> torch.Tensor:
    """Return what attention is, in float64."""
    parts = []
    group = case.spec.num_heads // case.spec.num_kv_heads
    table = case.sequences.block_table.long()
    for row, query in enumerate(case.query.double().split(new)):
        keys, values = (
            part[table[row]].flatten(0, 1)[:context].double().repeat_interleave(group, 1)
            for part in case.cache
        )
        scores = torch.einsum("nhd,thd->hnt", query, keys) * case.spec.scale
        position = torch.arange(context - new, context, device=query.device)[:, None]
        slot = torch.arange(context, device=query.device)[None]
        scores = scores.masked_fill(slot > position, float("-inf"))
        parts.append(torch.einsum("hnt,thd->nhd", scores.softmax(-1), values))
    return torch.cat(parts)


def decode(lab: Lab) -> None:
    """Time one layer's decode; bytes of keys and values a second."""
    for context in lab.pick(CONTEXTS, (40,)):
        for batch in lab.pick(BATCHES, (2,)):
            if batch * context > SLOTS_MAX:
                continue
            rates = kv_rates(lab, batch, context, is_block_major=True)
            target = None
            if batch >= lab.pick(32, 2):
                target = Target(DECODE_SHARE * lab.copy_bytes_per_s / 1e12)
            floor = lab.copy_bytes_per_s / 1e12
            key = f"decode_attention_batch{batch}_context{context}"
            lab.add(key, rates, "TB/s", floor=floor, target=target)


def kv_rates(lab: Lab, batch: int, context: int, *, is_block_major: bool) -> list[float]:
    """Return TB/s of keys and values, over layers in turn."""
    cases = [
        make_case(lab, batch, context, 1, is_block_major=is_block_major, layer=layer)
        for layer in range(lab.copies(4 * batch * context * KV_HEADS * HEAD_DIM, most=2))
    ]
    output = torch.empty_like(cases[0].query)
    times = lab.seconds(lambda i: cases[i % len(cases)].run(output), 20)
    spec = cases[0].spec
    num_bytes = 4 * batch * context * spec.num_kv_heads * spec.head_dim
    return [num_bytes / seconds / 1e12 for seconds in times]


def layouts(lab: Lab) -> None:
    """Time the same over a layer-major pool: what the block-major one costs."""
    batch, context = lab.pick((64, 4096), (2, 40))
    found = {
        name: kv_rates(lab, batch, context, is_block_major=name == "block")
        for name in ("block", "layer")
    }
    for name, rates in found.items():
        lab.add(f"decode_attention_{name}_major", rates, "TB/s")
    ratios = [block / layer for block, layer in zip(*found.values(), strict=True)]
    lab.add("block_major_over_layer_major", ratios, "x", target=Target(LAYOUT_SHARE))


def prefill(lab: Lab) -> None:
    """Time one layer's prefill of a whole prompt, and of a chunk behind a prefix."""
    for tokens in lab.pick(PREFILLS, (40,)):
        lab.add(f"prefill_attention_{tokens}", prefill_rates(lab, tokens, tokens), "TFLOP/s")
    context, new = lab.pick((32768, 2048), (64, 20))
    lab.add(
        f"prefill_attention_{new}_behind_{context - new}",
        prefill_rates(lab, context, new),
        "TFLOP/s",
        floor=lab.flops_per_s / 1e12 or None,
    )


def prefill_rates(lab: Lab, context: int, new: int) -> list[float]:
    """Return TFLOP/s: what causal attention has to multiply, twice."""
    case = make_case(lab, 1, context, new)
    output = torch.empty_like(case.query)
    times = lab.seconds(lambda _: case.run(output), 5)
    seen = new * context - new * (new - 1) // 2
    flops = 4 * seen * case.spec.num_heads * case.spec.head_dim
    return [flops / seconds / 1e12 for seconds in times]


def library(lab: Lab, name: str) -> ModuleType:
    """Return a library by its module, or its double where only the way is walked."""
    try:
        return import_module("tests.engine.attention.library_doubles" if lab.is_dry else name)
    except ImportError as error:
        raise Absent(f"{name} is not installed ({error})") from error


def flashinfer(lab: Lab) -> None:
    """Time FlashInfer's decode over the same pool, and see that it finds what ours does."""
    make = library(lab, "flashinfer").BatchDecodeWithPagedKVCacheWrapper
    for batch, context in lab.pick(((32, 4096), (128, 1024)), ((2, 40),)):
        case = make_case(lab, batch, context, 1)
        width = case.sequences.block_table.shape[1]
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=lab.device)
        wrapper = make(workspace, "NHD", use_tensor_cores=True)
        starts = torch.arange(batch + 1, device=lab.device, dtype=torch.int32) * width
        last = torch.full_like(case.sequences.kv_len, (context - 1) % BLOCK_SIZE + 1)
        spec = case.spec
        wrapper.plan(
            starts, case.sequences.block_table.flatten(), last, spec.num_heads,
            spec.num_kv_heads, spec.head_dim, BLOCK_SIZE,
            q_data_type=case.query.dtype, kv_data_type=case.query.dtype,
        )  # fmt: skip
        compare("FlashInfer", case, wrapper.run(case.query, case.cache))
        times = lab.seconds(lambda _, run=wrapper.run, c=case: run(c.query, c.cache), 20)
        num_bytes = 4 * batch * context * spec.num_kv_heads * spec.head_dim
        rates = [num_bytes / seconds / 1e12 for seconds in times]
        lab.add(f"flashinfer_decode_batch{batch}_context{context}", rates, "TB/s")


def compare(name: str, case: Case, theirs: torch.Tensor) -> None:
    """Hold what a library found against ours: a rate of something else would mean nothing."""
    ours = torch.empty_like(case.query)
    case.run(ours)
    error = (ours.double() - theirs.double()).abs().max().item()
    if not error < 2e-2:
        raise Wrong(f"{name} and our kernel are {error} apart")


def flash_attention_3(lab: Lab) -> None:
    """Time FA3's prefill of the same shape, of one piece of keys and values."""
    attend = library(lab, "flash_attn_interface").flash_attn_func
    for tokens in lab.pick(PREFILLS, (40,)):
        case = make_case(lab, 1, tokens, tokens)
        table = case.sequences.block_table[0].long()
        key, value = (part[table].flatten(0, 1)[None, :tokens].contiguous() for part in case.cache)
        query = case.query[None]
        compare("FA3", case, attend(query, key, value, causal=True)[0])
        times = lab.seconds(lambda _, q=query, k=key, v=value: attend(q, k, v, causal=True), 5)
        flops = 2 * tokens * (tokens + 1) * case.spec.num_heads * case.spec.head_dim
        lab.add(f"fa3_prefill_{tokens}", [flops / s / 1e12 for s in times], "TFLOP/s")


CHECKS = (Measure("attention is right", check),)
MEASURES = (
    Measure("attention, decode", decode),
    Measure("attention, two layouts", layouts),
    Measure("attention, prefill", prefill),
    Measure("attention by FlashInfer", flashinfer),
    Measure("attention by FA3", flash_attention_3),
)
