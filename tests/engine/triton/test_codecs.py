"""Codecs by Triton give the bytes of the codecs on the CPU, and numbers the same back."""

import numpy as np
import pytest
import torch

from penstock.codec.codec import make_codec
from penstock.core.block import KVGroup, KVLayout
from penstock.engine.triton.codecs import TRITON_CODECS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Layers, heads, head size, block size: groups of 16 and of 32, several tiles in a row and in a
# column, heads that are no power of two, two tokens alone.
SHAPES = [
    (1, 4, 32, 32),
    (1, 2, 128, 16),
    (1, 3, 16, 32),
    (1, 1, 80, 4),
    (1, 1, 16, 64),
    (2, 1, 16, 2),
]
NAMES = pytest.mark.parametrize("name", TRITON_CODECS)
KINDS = pytest.mark.parametrize("dtype", DTYPES)
NUM_BLOCKS, IDS, JUNK = 4, [3, 1, 0], 0xEE


def make(name, shape, dtype, seed=0):
    """Return the codec on the CPU and a pool, `[num_blocks, layers, 2, ...]`, of block 1 with large
    and of block 0 with small numbers.
    """
    layers, heads, head_dim, block_size = shape
    layout = KVLayout("m", (KVGroup(tuple(range(layers))),), heads, head_dim, block_size, dtype)
    generator = torch.Generator().manual_seed(seed)
    size = NUM_BLOCKS, layers, 2, block_size, heads, head_dim
    pool = torch.randn(size, generator=generator)
    pool[1] *= 3e4
    pool[0] *= 1e-6
    pool = pool.to(DTYPES[dtype])
    return make_codec(name, layout), pool


def as_bytes(pool: torch.Tensor) -> np.ndarray:
    return pool.contiguous().view(torch.uint8).reshape(len(pool), -1).numpy()


def encoded_on(device, name, pool, room=0):
    """Return what Triton encodes, with `room` bytes of junk behind each row."""
    rows = torch.full(
        (len(IDS), TRITON_CODECS[name].encoded_bytes(pool) + room),
        JUNK,
        dtype=torch.uint8,
        device=device,
    )
    TRITON_CODECS[name].encode(pool.to(device), torch.tensor(IDS, device=device), rows)
    return rows


def check(device, name, codec, pool) -> None:
    """Hold what Triton encodes and decodes against the CPU, which starts from the same bytes."""
    expected = np.zeros((len(IDS), codec.encoded_bytes), np.uint8)
    codec.encode(as_bytes(pool), IDS, expected)
    rows = encoded_on(device, name, pool)
    assert rows.cpu().numpy().tobytes() == expected.tobytes()
    back = torch.full_like(pool, 7)
    wanted = as_bytes(back.clone())
    codec.decode(expected, wanted, IDS)
    there = back.to(device)
    TRITON_CODECS[name].decode(rows, there, torch.tensor(IDS, device=device))
    assert as_bytes(there.cpu()).tobytes() == wanted.tobytes()


@KINDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@NAMES
def test_bytes_are_those_of_the_cpu(device, name, shape, dtype):
    codec, pool = make(name, shape, dtype)
    # A channel that is always the same, and one that is zero, of either sign.
    pool[..., 1] = pool[0, 0, 0, 0, 0, 1]
    pool[:, :, :, ::2, :, 2], pool[:, :, :, 1::2, :, 2] = 0.0, -0.0
    check(device, name, codec, pool)


@KINDS
@NAMES
def test_numbers_half_way_between_two_codes(device, name, dtype):
    codec, pool = make(name, (1, 2, 32, 32), dtype)
    # Steps of a quarter of a code, from a low and with a scale that float16 has exactly.
    steps = torch.arange(64).view(1, 1, 1, 32, 2, 1) * 0.25 + torch.arange(32) * 0.5
    pool[:] = (steps % 15.5 - 3.0).to(pool.dtype)
    check(device, name, codec, pool)


@KINDS
@NAMES
def test_what_float16_does_not_hold(device, name, dtype):
    codec, pool = make(name, (1, 2, 32, 32), dtype, seed=1)
    flat = pool.view(NUM_BLOCKS, -1)
    flat[:, 5], flat[:, 700], flat[:, 1500] = float("inf"), float("-inf"), 1e30
    flat[:, 2049:2080] = float("-inf")
    flat[:, 3001] = 1e-41
    check(device, name, codec, pool)


@NAMES
def test_what_is_no_number_stays_none(device, name):
    _, pool = make(name, (1, 2, 32, 32), "float32")
    pool[1, 0, 0, 3, 1, 4] = pool[1, 0, 1, 5, 0, 6] = float("nan")
    rows = encoded_on(device, name, pool)
    back = torch.zeros_like(pool)
    there = back.to(device)
    TRITON_CODECS[name].decode(rows, there, torch.tensor(IDS, device=device))
    assert there[1, 0, 0, 3, 1, 4].isnan()
    assert there[1, 0, 1, 5, 0, 6].isnan()
    assert not there[3].isnan().any()


@NAMES
def test_nothing_is_written_behind_a_row_or_into_other_blocks(device, name):
    codec, pool = make(name, SHAPES[3], "bfloat16")
    rows = encoded_on(device, name, pool, room=6)
    assert TRITON_CODECS[name].encoded_bytes(pool) == codec.encoded_bytes
    assert (rows[:, codec.encoded_bytes :] == JUNK).all()
    there = torch.full_like(pool, 7).to(device)
    TRITON_CODECS[name].decode(rows, there, torch.tensor(IDS, device=device))
    assert (there[2] == 7).all()
    assert (there[3].cpu().float() - pool[3].float()).abs().max() < 0.5


@NAMES
def test_no_blocks_are_no_launch(device, name):
    _, pool = make(name, SHAPES[5], "float32")
    none = torch.empty(0, dtype=torch.int64, device=device)
    rows = torch.full(
        (1, TRITON_CODECS[name].encoded_bytes(pool)), JUNK, dtype=torch.uint8, device=device
    )
    TRITON_CODECS[name].encode(pool.to(device), none, rows)
    assert (rows == JUNK).all()
