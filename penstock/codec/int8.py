"""int8: a byte a number, and a low and a scale for each group. See `affine.py`."""

from penstock.codec.affine import affine_method

INT8 = affine_method(8, pack=lambda codes: codes, unpack=lambda codes: codes)
