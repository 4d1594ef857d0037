"""Every codec in one matrix: bounds of the error, sizes, native against numpy, and junk."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.codec import codec as codec_module
from penstock.codec.codec import CODECS, make_codec
from penstock.codec.native import library
from penstock.core.block import KVGroup, KVLayout
from penstock.core.errors import BackendUnavailable, BlocksCorrupt
from penstock.transfer.reshape import convert

DTYPES = ("float32", "bfloat16", "float16")
STORED = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}
# Layers, heads, head size, block size: groups of 16 and of 32, an odd number of units in a row,
# heads that are no power of two, several groups of tokens, a single line.
SHAPES = [(2, 4, 32, 32), (1, 2, 128, 16), (1, 3, 16, 32), (1, 1, 80, 64), (2, 1, 16, 2)]
RATIOS = {"int8": 9 / 16, "int4": 5 / 16, "fp8": 0.53125, "sparse": 0.5625}
"""Bytes over those in bfloat16, with heads of 32 and blocks of 32."""
ERRORS_MAX = {"lossless": 0.0, "fp8": 0.035, "int8": 0.008, "int4": 0.12, "sparse": 0.45}
"""Root of the mean square of the error over that of the numbers."""


def layout_of(shape, dtype):
    layers, heads, head_dim, block_size = shape
    return KVLayout("m", (KVGroup(tuple(range(layers))),), heads, head_dim, block_size, dtype)


def pool_of(layout, num_blocks=5, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    numbers = rng.standard_normal(num_blocks * layout.block_bytes[0]).astype(np.float32) * scale
    stored = convert(numbers, "float32", layout.dtype).view(np.uint8)
    return stored[: num_blocks * layout.block_bytes[0]].reshape(num_blocks, -1).copy()


def floats(pool, dtype):
    return convert(pool.view(STORED[dtype]), dtype, "float32").astype(np.float64)


def round_trip(codec, pool, ids):
    encoded = np.full((len(ids), codec.encoded_bytes), 0xEE, np.uint8)
    codec.encode(pool, ids, encoded)
    back = np.full_like(pool, 0xDD)
    codec.decode(encoded, back, ids)
    return back


@pytest.fixture(params=["native", "numpy"])
def is_native(request):
    if request.param == "native" and library.load_library() is None:
        pytest.skip("there is no compiler")
    return request.param == "native"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CODECS)
def test_errors_are_bounded(name, shape, dtype, is_native):
    layout = layout_of(shape, dtype)
    codec = make_codec(name, layout, is_native=is_native)
    pool, ids = pool_of(layout), [3, 0, 4]
    back = round_trip(codec, pool, ids)
    wanted, got = floats(pool[ids], dtype), floats(back[ids], dtype)
    error = np.sqrt(((wanted - got) ** 2).mean() / (wanted**2).mean())
    assert error <= ERRORS_MAX[name], error
    # The rest of the pool is nobody's business.
    assert (back[[1, 2]] == 0xDD).all()
    if codec.is_lossless:
        assert back[ids].tobytes() == pool[ids].tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 3e4])
def test_native_kernels_give_the_bytes_of_the_reference(name, shape, dtype, scale):
    if library.load_library() is None:
        pytest.skip("there is no compiler")
    layout = layout_of(shape, dtype)
    pool, ids = pool_of(layout, seed=1, scale=scale), [4, 1]
    # A channel that is always the same, and one that is zero, of either sign.
    numbers = pool.view(STORED[dtype]).reshape(len(pool), -1, layout.num_kv_heads * shape[2])
    numbers[:, :, 1] = numbers[0, 0, 1]
    numbers[:, ::2, 2], numbers[:, 1::2, 2] = 0, convert(np.float32([-0.0]), "float32", dtype)[0]
    results = []
    for is_native in (True, False):
        codec = make_codec(name, layout, is_native=is_native)
        encoded = np.zeros((2, codec.encoded_bytes), np.uint8)
        lengths = codec.encode(pool, ids, encoded)
        back = np.zeros_like(pool)
        codec.decode(encoded, back, ids)
        results.append((lengths.tolist(), encoded.tobytes(), back.tobytes()))
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CODECS)
def test_sizes_are_fixed_or_bounded(name, dtype, is_native):
    layout = layout_of(SHAPES[0], dtype)
    codec = make_codec(name, layout, is_native=is_native)
    assert codec.block_bytes == layout.block_bytes[0]
    pool = pool_of(layout)
    encoded = np.zeros((5, codec.encoded_bytes + 3), np.uint8)
    lengths = codec.encode(pool, range(5), encoded)
    if codec.is_lossless:
        assert (lengths < codec.block_bytes).all()
        assert codec.encoded_bytes == codec.block_bytes + 8
        assert [int(row[:4].view(np.uint32)[0]) for row in encoded] == lengths.tolist()
    else:
        assert set(lengths.tolist()) == {codec.encoded_bytes}
        assert codec.encoded_bytes < codec.block_bytes
    if not codec.is_lossless and dtype == "bfloat16":
        assert codec.encoded_bytes / codec.block_bytes == RATIOS[name]
    # Nothing is written behind what was encoded.
    assert all(not row[length:].any() for row, length in zip(encoded, lengths, strict=True))


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_native_size_is_ours(name, dtype):
    if (native := library.load_library()) is None:
        pytest.skip("there is no compiler")
    for shape in SHAPES:
        codec = make_codec(name, layout_of(shape, dtype))
        number, native_shape = library.METHODS.index(name), codec._native_shape()
        assert native.penstock_encoded_bytes(number, native_shape) == codec.encoded_bytes


def test_each_number_is_within_half_a_step(is_native):
    layout = layout_of((1, 2, 32, 32), "float32")
    for name, levels in (("int8", 255), ("int4", 15)):
        codec = make_codec(name, layout, is_native=is_native)
        pool = pool_of(layout, seed=3)
        wanted = floats(pool, "float32").reshape(5, 2, 32, 64)
        got = floats(round_trip(codec, pool, range(5)), "float32").reshape(wanted.shape)
        keys, values = wanted[:, 0], wanted[:, 1].reshape(5, 32, 2, 32)
        key_steps = np.ptp(keys, 1)[:, None] / levels
        value_steps = np.ptp(values, 3)[..., None] / levels
        # Scales and lows are float16: a number may be a little further away than half a step.
        room = np.abs(wanted).max() * 2**-10
        assert (np.abs(keys - got[:, 0]) <= 0.5 * key_steps + room).all()
        assert (np.abs(values - got[:, 1].reshape(values.shape)) <= 0.5 * value_steps + room).all()


def test_fp8_decodes_every_code_as_float8_says(is_native):
    # Sign, exponent with bias 7, mantissa of 3 bits.
    layout = layout_of((1, 1, 128, 2), "float32")
    codec = make_codec("fp8", layout, is_native=is_native)
    encoded = np.zeros((1, codec.encoded_bytes), np.uint8)
    planes = encoded.reshape(2, -1)
    planes[:, :4] = np.ones((2, 2), np.float16).view(np.uint8)
    planes[:, 4:] = np.tile(np.arange(256, dtype=np.uint8), 2).reshape(2, 256)
    pool = np.zeros((1, codec.block_bytes), np.uint8)
    codec.decode(encoded, pool, [0])
    got = pool.view(np.float32).reshape(2, 256)[0]
    for code in range(256):
        sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
        size = (8 + mantissa) / 8 * 2.0 ** (exponent - 7) if exponent else mantissa / 512
        assert got[code] == (-size if sign else size)


def test_sparsified_keeps_the_larger_half_as_it_is(is_native):
    layout = layout_of((1, 2, 16, 4), "bfloat16")
    codec = make_codec("sparse", layout, is_native=is_native)
    pool = pool_of(layout)
    heads = pool.view(np.uint16).reshape(-1, 16)
    heads[0] = 0x3F80  # All of a size: the first are kept.
    back = round_trip(codec, pool, range(5)).view(np.uint16).reshape(-1, 16)
    for head, got in zip(heads, back, strict=True):
        kept = np.flatnonzero(got)
        assert len(kept) <= 8
        assert (got[kept] == head[kept]).all()
        dropped = np.delete(head & 0x7FFF, kept)
        assert (head[kept] & 0x7FFF).min() >= dropped.max()
    assert np.flatnonzero(back[0]).tolist() == list(range(8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_lossless_keeps_noise_and_a_single_number(dtype, is_native):
    layout = layout_of(SHAPES[2], dtype)
    codec = make_codec("lossless", layout, is_native=is_native)
    pool = np.random.default_rng(5).integers(0, 256, (3, codec.block_bytes)).astype(np.uint8)
    pool[1] = 7
    encoded = np.zeros((3, codec.encoded_bytes), np.uint8)
    lengths = codec.encode(pool, range(3), encoded)
    # Mantissas are kept as they are: of float32 three bytes of four.
    assert lengths[1] < 0.8 * codec.block_bytes
    assert lengths.max() <= codec.encoded_bytes
    back = np.zeros_like(pool)
    codec.decode(encoded, back, range(3))
    assert back.tobytes() == pool.tobytes()


@settings(max_examples=60)
@given(data=st.data())
def test_lossless_is_lossless(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    layout = layout_of((1, 1, 16, 2), dtype)
    content = data.draw(st.binary(min_size=layout.block_bytes[0], max_size=layout.block_bytes[0]))
    pool = np.frombuffer(content, np.uint8).reshape(1, -1).copy()
    for is_native in (True, False):
        codec = make_codec("lossless", layout, is_native=is_native)
        assert round_trip(codec, pool, [0]).tobytes() == content


@settings(max_examples=150)
@given(data=st.data())
def test_junk_is_refused_or_decoded_but_touches_nothing_else(data):
    name = data.draw(st.sampled_from(list(CODECS)))
    layout = layout_of((1, 1, 16, 4), data.draw(st.sampled_from(DTYPES)))
    codec = make_codec(name, layout, is_native=data.draw(st.booleans()))
    pool = pool_of(layout, seed=data.draw(st.integers(0, 3)))
    encoded = np.zeros((1, codec.encoded_bytes), np.uint8)
    codec.encode(pool, [0], encoded)
    if data.draw(st.booleans()):
        encoded[:] = np.frombuffer(
            data.draw(st.binary(min_size=codec.encoded_bytes, max_size=codec.encoded_bytes)),
            np.uint8,
        )
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, min(300, codec.encoded_bytes - 1)))
        encoded[0, place] ^= data.draw(st.integers(1, 255))
    # Guards on either side; what a decoder reads beyond its row, it would have to read from there.
    guarded = np.full((3, codec.block_bytes), 0xAB, np.uint8)
    try:
        codec.decode(encoded, guarded, [1])
    except BlocksCorrupt:
        assert codec.is_lossless
    assert (guarded[[0, 2]] == 0xAB).all()


def test_a_flipped_bit_in_the_coded_part_is_noticed(is_native):
    layout = layout_of(SHAPES[0], "bfloat16")
    codec = make_codec("lossless", layout, is_native=is_native)
    pool = pool_of(layout)
    encoded = np.zeros((1, codec.encoded_bytes), np.uint8)
    (length,) = codec.encode(pool, [0], encoded)
    encoded[0, length - 40] ^= 4
    with pytest.raises(BlocksCorrupt):
        codec.decode(encoded, pool, [0])


def test_a_row_that_is_too_short_is_refused(is_native):
    layout = layout_of(SHAPES[0], "bfloat16")
    for name in CODECS:
        codec = make_codec(name, layout, is_native=is_native)
        pool = pool_of(layout)
        encoded = np.zeros((1, codec.encoded_bytes), np.uint8)
        (length,) = codec.encode(pool, [0], encoded)
        short = encoded[:, : length - 1].copy()
        with pytest.raises(BlocksCorrupt):
            codec.decode(short, pool, [0])
        with pytest.raises(BlocksCorrupt):
            codec.decode(encoded[:, :4].copy(), pool, [0])


def test_a_block_outside_the_pool_is_a_bug(is_native):
    layout = layout_of(SHAPES[0], "bfloat16")
    codec = make_codec("int8", layout, is_native=is_native)
    encoded = np.zeros((1, codec.encoded_bytes), np.uint8)
    for block_id in (-1, 5):
        with pytest.raises(AssertionError):
            codec.encode(pool_of(layout), [block_id], encoded)


@pytest.mark.parametrize(
    ("name", "head_dim", "block_size", "message"),
    [("zip", 32, 32, "'zip': one of"), ("int8", 24, 32, "of 16"), ("int8", 32, 3, "even")],
)
def test_what_codecs_are_not_made_for_is_refused(name, head_dim, block_size, message):
    with pytest.raises(ValueError, match=message):
        make_codec(name, layout_of((1, 1, head_dim, block_size), "float32"))


def test_without_a_compiler_numpy_does_it_and_says_so_once(monkeypatch, caplog):
    def no_compiler(_recipe):
        raise BackendUnavailable("there is no C++ compiler")

    monkeypatch.setattr(library, "build", no_compiler)
    library.load_library.cache_clear()
    try:
        layout = layout_of(SHAPES[0], "bfloat16")
        codecs = [make_codec("int8", layout) for _ in range(2)]
    finally:
        library.load_library.cache_clear()
    assert [codec.library for codec in codecs] == [None, None]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    pool = pool_of(layout)
    assert (round_trip(codecs[0], pool, [0])[0] != 0xDD).any()
    assert codec_module.CODECS.keys() == set(library.METHODS)
