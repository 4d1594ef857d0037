"""Rows that decode on the device: records land where they say, and tokens move rows on."""

import numpy as np
import torch

from penstock.engine.triton.decode_rows import (
    HEADER_WORDS,
    DecodeRows,
    advance_rows,
    patch_rows,
)
from penstock.engine.triton.sample import SamplingRows

GROUPS, ROWS, WIDTH, BLOCK_SIZE = 2, 5, 200, 8


def make_rows(device) -> DecodeRows:
    def full(*shape, dtype=torch.int64):
        return torch.full(shape, -7, dtype=dtype, device=device)

    real = torch.float32
    sampling = SamplingRows(
        full(ROWS, dtype=real), full(ROWS, dtype=real), full(ROWS, dtype=torch.float64),
        full(ROWS, dtype=torch.int32), full(ROWS), full(ROWS),
    )  # fmt: skip
    tables = full(GROUPS, ROWS, WIDTH, dtype=torch.int32)
    return DecodeRows(
        full(ROWS), full(ROWS, dtype=torch.int32), full(GROUPS, ROWS), tables, sampling
    )


def record(row: int, kv_len: int, used: int) -> np.ndarray:
    """Of a row whose token is 2^33 + row, and whose blocks are 1000 group + column + row."""
    words = np.zeros(HEADER_WORDS + GROUPS * used, np.int32)
    words[:2] = row, kv_len
    words[2:8] = np.array([2**33 + row, kv_len - 1, -3], np.int64).view(np.int32)
    words[8:10] = np.array([0.1 + row], np.float64).view(np.int32)
    words[10:12] = np.array([0.5, 0.25], np.float32).view(np.int32)
    words[12] = 40 + row
    for group in range(GROUPS):
        words[HEADER_WORDS + group * used :][:used] = 1000 * group + np.arange(used) + row
    return words


def patched(device) -> DecodeRows:
    rows = make_rows(device)
    records = np.stack([record(3, 8 * 129 + 1, 140), record(1, 0, 140), record(0, 16, 140)])
    patch_rows(torch.from_numpy(records).to(device), rows, BLOCK_SIZE)
    return rows


def test_records_land_in_their_rows_and_nowhere_else(device):
    rows = patched(device)
    how = rows.sampling
    assert rows.token_ids.tolist() == [2**33, 2**33 + 1, -7, 2**33 + 3, -7]
    assert rows.kv_len.tolist() == [16, 0, -7, 8 * 129 + 1, -7]
    assert how.positions.tolist() == [15, -1, -7, 8 * 129, -7]
    assert how.seeds.tolist() == [-3, -3, -7, -3, -7]
    assert how.top_p.tolist() == [0.1, 1.1, -7.0, 3.1, -7.0]
    assert (how.temperature[3].item(), how.min_p[3].item()) == (0.5, 0.25)
    assert how.top_k.tolist() == [40, 41, -7, 43, -7]
    # Block 129 of row 3, whose number is 132 or 1132; padding writes nowhere.
    assert rows.slots.tolist() == [[15, -1, -7, 132 * 8, -7], [1001 * 8 + 7, -1, -7, 1132 * 8, -7]]
    assert rows.tables[1, 3, :140].tolist() == [1003 + i for i in range(140)]
    assert (rows.tables[:, 3, 140:] == -7).all()
    assert (rows.tables[:, [2, 4]] == -7).all()


def test_a_token_moves_its_row_on_and_padding_stays(device):
    rows = patched(device)
    advance_rows(torch.arange(100, 102, device=device), rows, BLOCK_SIZE)
    assert rows.token_ids.tolist() == [100, 2**33 + 1, -7, 2**33 + 3, -7]
    assert rows.kv_len.tolist() == [17, 0, -7, 8 * 129 + 1, -7]
    assert rows.sampling.positions.tolist() == [16, -1, -7, 8 * 129, -7]
    # Position 16 is the first of block 2, whose number is 2, or 1002.
    assert rows.slots[:, 0].tolist() == [16, 1002 * 8]
    assert rows.slots[:, 1].tolist() == [-1, -1]
