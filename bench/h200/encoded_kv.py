"""What a decode step reads with keys and values in bfloat16, fp8 and int4: bytes, and the time of
attention over them. KVFlow's comparison, on real hardware.

Source: KVFlow's experiment, whose cold blocks are compressed; here they are so in the GPU's memory.
"""

from __future__ import annotations

import torch

from h200.attention import PROCESSORS, Case, dense
from h200.encoded_attention import BLOCK_SIZE, EncodedPool, attend_encoded
from h200.lab import Lab, Measure, Target, Wrong
from penstock.engine.attention import AttentionSpec
from penstock.engine.triton.codecs import TRITON_CODECS
from penstock.engine.triton.paged_attention import Sequences, SplitSpace, decode_splits

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 32, 8, 128, 32
"""Llama-3.1-8B, for the bytes of a step; times are of one layer."""
BATCH, CONTEXT = 64, 4096
ENCODED = "fp8", "int4"


def make(lab: Lab, batch: int, context: int) -> tuple[Case, torch.Tensor]:
    """Return a decode step over a pool of two layers, and the pool."""
    heads, kv_heads, head_dim = lab.pick((HEADS, KV_HEADS, HEAD_DIM), (4, 2, 32))
    width = -(-context // BLOCK_SIZE)
    pool = lab.normal(batch * width, 2, 2, BLOCK_SIZE, kv_heads, head_dim)
    table = torch.randperm(batch * width, device=lab.device).int().view(batch, width)
    starts = torch.arange(batch + 1, device=lab.device, dtype=torch.int32)
    lengths = torch.full((batch,), context, device=lab.device, dtype=torch.int32)
    num_splits, splits = decode_splits(batch, kv_heads, lab.pick(PROCESSORS, 4)), None
    if num_splits > 1:
        parts = torch.empty(num_splits, batch, heads, head_dim, device=lab.device)
        splits = SplitSpace(parts, parts.new_empty(num_splits, batch, heads))
    spec = AttentionSpec(0, 1, heads, kv_heads, head_dim, head_dim**-0.5)
    sequences = Sequences(starts, lengths, table, batch, 1)
    cache = pool[:, 1, 0], pool[:, 1, 1]
    return Case(spec, lab.normal(batch, heads, head_dim), cache, sequences, splits), pool


def encode(pool: torch.Tensor, name: str) -> EncodedPool:
    """Return a pool's blocks encoded."""
    codec, ids = TRITON_CODECS[name], torch.arange(len(pool), device=pool.device)
    size = len(pool), codec.encoded_bytes(pool)
    rows = torch.empty(size, dtype=torch.uint8, device=pool.device)
    codec.encode(pool, ids, rows)
    return EncodedPool(rows, name, pool.shape[4], pool.shape[5])


def check(lab: Lab) -> None:
    """Compare with attention over the same blocks decoded: only the rounding may differ."""
    case, pool = make(lab, 2, 75)
    for name in ENCODED:
        encoded = encode(pool, name)
        ids = torch.arange(len(pool), device=pool.device)
        decoded = torch.empty_like(pool)
        TRITON_CODECS[name].decode(encoded.rows, decoded, ids)
        wanted = dense(
            Case(case.spec, case.query, (decoded[:, 1, 0], decoded[:, 1, 1]), case.sequences, None),
            75,
            1,
        )
        output = torch.full_like(case.query, float("nan"))
        sequences = case.sequences
        attend_encoded(encoded, 1, case.query, sequences.block_table, sequences.kv_len, output)
        error = (output.double() - wanted).abs().max().item()
        if not error < 3e-2:
            raise Wrong(f"attention over {name} blocks is {error} off")


def step(lab: Lab) -> None:
    """Count what a step of the whole model reads, and time a layer's attention over it."""
    batch, context = lab.pick((BATCH, CONTEXT), (2, 40))
    case, pool = make(lab, batch, context)
    output, sequences = torch.empty_like(case.query), case.sequences
    raw = lab.seconds(lambda _: case.run(output), 20)
    layer_bytes = {"bf16": pool[0].numel()}
    seconds = {"bf16": raw}
    for name in ENCODED:
        encoded = encode(pool, name)
        layer_bytes[name] = encoded.rows.shape[1] // 2
        seconds[name] = lab.seconds(
            lambda _, e=encoded: attend_encoded(
                e, 1, case.query, sequences.block_table, sequences.kv_len, output
            ),
            20,
        )
    num_blocks = batch * -(-context // BLOCK_SIZE)
    for name, found in seconds.items():
        step_bytes = LAYERS * num_blocks * layer_bytes[name]
        lab.add(f"kv_{name}_bytes_read_by_a_step", [step_bytes / 1e9], "GB")
        num_bytes = num_blocks * layer_bytes[name]
        floor = 1e6 * num_bytes / lab.copy_bytes_per_s if lab.copy_bytes_per_s else None
        lab.add(f"kv_{name}_attention_of_a_layer", [1e6 * s for s in found], "us", floor=floor)
    for name in ENCODED:
        pairs = zip(seconds["bf16"], seconds[name], strict=True)
        lab.add(f"kv_{name}_over_bf16", [a / b for a, b in pairs], "x", target=Target(1.0))


CHECKS = (Measure("attention over encoded blocks is right", check),)
MEASURES = (Measure("bytes of keys and values by their type", step),)
