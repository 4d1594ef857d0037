"""int4: half a byte a number, and a low and a scale for each group. See `affine.py`.

The codes of tokens 2 i and 2 i + 1 share a byte, the former in its lower half.
"""

import numpy as np

from penstock.codec.affine import Codes, affine_method


def _pack(codes: Codes) -> Codes:
    return (codes[0::2] | codes[1::2] << 4).astype(np.uint8)


def _unpack(codes: Codes) -> Codes:
    return np.stack([codes & 15, codes >> 4], 1).astype(np.uint8).reshape(-1, codes.shape[1])


INT4 = affine_method(4, pack=_pack, unpack=_unpack)
