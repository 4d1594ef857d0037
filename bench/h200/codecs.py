"""Codecs and digests on the device: the bytes of the CPU, then how fast."""

from __future__ import annotations

import numpy as np
import torch

from h200.lab import Lab, Measure, Wrong
from penstock.codec.codec import make_codec
from penstock.core.block import KVGroup, KVLayout
from penstock.engine.device_digest import DeviceDigests
from penstock.engine.triton.codecs import TRITON_CODECS
from penstock.engine.triton.digest import digest_blocks, digest_space
from penstock.transfer.digest import take_digests

LAYERS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 32
NUM_BLOCKS = 128
"""A prompt of 4096 tokens of Llama-3.1-8B: 512 MiB."""


def make_pool(lab: Lab, num_blocks: int) -> torch.Tensor:
    """Return a pool as that of Llama-3.1-8B."""
    layers, heads, head_dim, block_size = lab.pick(
        (LAYERS, KV_HEADS, HEAD_DIM, BLOCK_SIZE), (1, 1, 32, 4)
    )
    return lab.normal(num_blocks, layers, 2, block_size, heads, head_dim)


def check(lab: Lab) -> None:
    """Compare bytes and digests with the CPU's."""
    pool = make_pool(lab, 3)
    _, layers, _, block_size, heads, head_dim = pool.shape
    layout = KVLayout(
        "bench", (KVGroup(tuple(range(layers))),), heads, head_dim, block_size, "bfloat16"
    )
    blocks = pool.view(len(pool), -1).view(torch.uint8).cpu().numpy()
    ids = torch.tensor([2, 0], device=lab.device)
    for name, codec in TRITON_CODECS.items():
        rows = torch.empty(2, codec.encoded_bytes(pool), dtype=torch.uint8, device=lab.device)
        codec.encode(pool, ids, rows)
        expected = np.empty(rows.shape, np.uint8)
        make_codec(name, layout).encode(blocks, [2, 0], expected)
        differing = int((rows.cpu().numpy() != expected).sum())
        if differing:
            raise Wrong(f"{differing} bytes of {name} are not those of the CPU")
    if DeviceDigests(pool).take([2, 0]) != take_digests(blocks, [2, 0]):
        raise Wrong("digests are not those of the CPU")


def rates(lab: Lab) -> None:
    """Time each direction of each codec; raw bytes a second."""
    num_blocks = lab.pick(NUM_BLOCKS, 2)
    pool = make_pool(lab, num_blocks)
    ids = torch.randperm(num_blocks, device=lab.device)
    raw_bytes = pool.numel() * pool.element_size()
    for name, codec in TRITON_CODECS.items():
        size = num_blocks, codec.encoded_bytes(pool)
        rows = torch.empty(size, dtype=torch.uint8, device=lab.device)
        # At the speed of a copy that reads the one and writes the other.
        moved = raw_bytes + rows.numel()
        floor = lab.copy_bytes_per_s / moved * raw_bytes / 1e9 or None
        encode = lab.seconds(lambda _, e=codec.encode, r=rows: e(pool, ids, r), 5)
        lab.add(f"{name}_encode", [raw_bytes / s / 1e9 for s in encode], "GB/s", floor=floor)
        decode = lab.seconds(lambda _, d=codec.decode, r=rows: d(r, pool, ids), 5)
        lab.add(f"{name}_decode", [raw_bytes / s / 1e9 for s in decode], "GB/s", floor=floor)


def digests(lab: Lab) -> None:
    """Time digests of many blocks, and of the one that a step has completed."""
    num_blocks = lab.pick(NUM_BLOCKS, 2)
    pool = make_pool(lab, num_blocks)
    blocks = pool.view(num_blocks, -1).view(torch.uint8)
    ids = torch.randperm(num_blocks, device=lab.device)
    space, found = digest_space(blocks, num_blocks), torch.empty_like(ids)
    times = lab.seconds(lambda _: digest_blocks(blocks, ids, space, found), 5)
    rates_found = [blocks.numel() / s / 1e9 for s in times]
    lab.add("digest", rates_found, "GB/s", floor=lab.copy_bytes_per_s / 1e9 or None)
    one = lab.seconds(lambda i: digest_blocks(blocks, ids[i : i + 1], space, found), 5)
    lab.add("digest_of_one_block", [1e6 * s for s in one], "us")


CHECKS = (Measure("codecs and digests are the CPU's", check),)
MEASURES = Measure("codecs", rates), Measure("digests", digests)
