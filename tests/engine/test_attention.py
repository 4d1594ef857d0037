"""Attention back ends against dense attention in float64, over pools full of NaN."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from penstock.engine.attention import AttentionBackend
from penstock.engine.attention.cpu import CpuAttention
from penstock.engine.attention.reference import ReferenceAttention
from penstock.engine.native.library import load_library
from tests.engine.attention_cases import make_case


@pytest.fixture(scope="module")
def cpu() -> CpuAttention:
    library = load_library().library
    assert library is not None, "the tests need a C++ compiler"
    return CpuAttention(library)


def backends(cpu: CpuAttention) -> tuple[AttentionBackend, ...]:
    return ReferenceAttention(), cpu


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
MIXED = [(1, 1), (1, 40), (3, 3), (5, 300), (70, 70), (33, 600), (1, 513), (2, 17)]


@DTYPES
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 96, 112, 128, 192, 256])
def test_prefill_decode_and_chunks_in_one_batch(cpu, dtype, head_dim):
    case = make_case(MIXED, dtype=dtype, head_dim=head_dim, block_size=32)
    for backend in backends(cpu):
        case.check(backend)


@DTYPES
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads"),
    [(1, 1), (4, 4), (6, 2), (8, 2), (5, 1), (6, 1), (7, 1), (8, 1), (24, 2), (12, 1)],
)
def test_any_ratio_of_query_to_kv_heads(cpu, dtype, num_heads, num_kv_heads):
    case = make_case(MIXED, dtype=dtype, num_heads=num_heads, num_kv_heads=num_kv_heads)
    for backend in backends(cpu):
        case.check(backend)


@DTYPES
@pytest.mark.parametrize("block_size", [1, 8, 16, 32, 64, 128])
def test_any_block_size(cpu, dtype, block_size):
    for backend in backends(cpu):
        make_case(MIXED, dtype=dtype, block_size=block_size).check(backend)


@DTYPES
@pytest.mark.parametrize("window", [1, 2, 15, 64, 255, 4096])
@pytest.mark.parametrize("sinks", [False, True])
def test_windows_and_sinks(cpu, dtype, window, sinks):
    case = make_case(MIXED, dtype=dtype, window=window, sinks=sinks)
    for backend in backends(cpu):
        case.check(backend)


@DTYPES
@pytest.mark.parametrize("softcap", [0.5, 20.0])
def test_softcap(cpu, dtype, softcap):
    case = make_case(MIXED, dtype=dtype, softcap=softcap, sinks=True)
    for backend in backends(cpu):
        case.check(backend)


@DTYPES
def test_long_context_crosses_many_chunks(cpu, dtype):
    case = make_case([(1, 3000), (300, 2100)], dtype=dtype, num_heads=8, head_dim=32)
    for backend in backends(cpu):
        case.check(backend)


@pytest.mark.parametrize("seed", range(60))
def test_random_shapes(cpu, seed):
    rng = np.random.default_rng(seed)
    num_kv_heads = int(rng.integers(1, 5))
    lengths = [
        (int(min(new, total)), int(total))
        for new, total in zip(
            rng.choice([1, 1, 2, 9, 130], 6), rng.integers(1, 700, 6), strict=True
        )
    ]
    case = make_case(
        lengths,
        dtype=[torch.float32, torch.bfloat16][seed % 2],
        seed=seed,
        num_heads=num_kv_heads * int(rng.integers(1, 10)),
        num_kv_heads=num_kv_heads,
        head_dim=16 * int(rng.integers(1, 17)),
        block_size=int(rng.choice([4, 16, 32, 64])),
        window=int(rng.choice([0, 0, 3, 50, 300])),
        softcap=float(rng.choice([0.0, 0.0, 30.0])),
        sinks=bool(rng.integers(2)),
    )
    case.check(cpu)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Set the number of threads for a test; torch and the kernels share one OpenMP runtime."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@DTYPES
def test_a_row_depends_neither_on_its_batch_nor_on_threads(cpu, dtype, set_threads):
    case = make_case([(1, 3000), (1, 30), (40, 200), (1, 1024), (1, 1025)], dtype=dtype, sinks=True)
    caches = case.key_cache, case.value_cache
    output = cpu.attend(case.spec, case.query, *caches, case.batch)
    starts = case.batch.query_start.tolist()
    for threads in (1, 2, 5):
        set_threads(threads)
        assert torch.equal(cpu.attend(case.spec, case.query, *caches, case.batch), output)
        for i, rows in enumerate(slice(*pair) for pair in pairwise(starts)):
            alone = replace(
                case.batch,
                query_start=torch.tensor([0, rows.stop - rows.start], dtype=torch.int32),
                kv_len=case.batch.kv_len[i : i + 1],
                block_tables=(case.batch.block_tables[0][i : i + 1].contiguous(),),
            )
            result = cpu.attend(case.spec, case.query[rows], *caches, alone)
            assert torch.equal(result, output[rows])


@DTYPES
@pytest.mark.parametrize("window", [0, 70])
def test_a_chunk_computes_what_the_whole_prefill_does(cpu, dtype, window):
    case = make_case([(600, 600)], dtype=dtype, window=window, block_size=32)
    caches = case.key_cache, case.value_cache
    whole = cpu.attend(case.spec, case.query, *caches, case.batch)
    for begin, end in [(0, 97), (97, 400), (400, 410), (410, 600)]:
        chunk = replace(
            case.batch,
            query_start=torch.tensor([0, end - begin], dtype=torch.int32),
            kv_len=torch.tensor([end], dtype=torch.int32),
        )
        result = cpu.attend(case.spec, case.query[begin:end], *caches, chunk)
        assert torch.equal(result, whole[begin:end])


@DTYPES
@pytest.mark.parametrize("total", [1023, 1024, 1025, 2048, 2049, 5000])
@pytest.mark.parametrize("window", [0, 1100])
def test_parts_of_a_long_context_are_merged(cpu, dtype, total, window):
    options = {"num_heads": 4, "num_kv_heads": 1, "sinks": True, "window": window}
    make_case([(1, total), (2, total)], dtype=dtype, **options).check(cpu)


@DTYPES
def test_empty_sequences_and_batches(cpu, dtype):
    case = make_case([(0, 20), (2, 9), (0, 1)], dtype=dtype)
    for backend in backends(cpu):
        case.check(backend)
    nothing = make_case([(0, 5)], dtype=dtype)
    output = cpu.attend(
        nothing.spec, nothing.query, nothing.key_cache, nothing.value_cache, nothing.batch
    )
    assert output.shape == (0, 4, 64)


@DTYPES
def test_any_strides(cpu, dtype):
    case = make_case(MIXED, dtype=dtype)
    # Heads outside, keys and values interleaved: nothing like the usual pool.
    blocks, slots, heads, dim = case.key_cache.shape
    strange = torch.full((heads, slots, blocks, 2, dim + 16), float("nan"), dtype=dtype)
    both = strange[..., :dim].permute(2, 1, 0, 3, 4)
    both[:, :, :, 0], both[:, :, :, 1] = case.key_cache, case.value_cache
    case.key_cache, case.value_cache = both[:, :, :, 0], both[:, :, :, 1]
    for backend in backends(cpu):
        case.check(backend)


@DTYPES
@pytest.mark.parametrize("head_dim", [32, 80])
def test_what_is_stored_is_read_back(cpu, dtype, head_dim):
    block_size, rows = 16, 50
    key, value = torch.randn(2, rows, 2, head_dim).to(dtype)
    slots = torch.randperm(8 * block_size)[:rows]
    slots[::7] = -1
    for backend in backends(cpu):
        pool = torch.zeros(8, 3, 2, block_size, 2, head_dim, dtype=dtype)
        key_cache, value_cache = pool[:, 1, 0], pool[:, 1, 1]
        # Rows with heads outside, as Hugging Face hands them over.
        strided = key.transpose(0, 1).contiguous().transpose(0, 1)
        backend.store(strided, value, key_cache, value_cache, slots)
        kept = slots >= 0
        where = slots[kept] // block_size, slots[kept] % block_size
        assert torch.equal(key_cache[where], key[kept])
        assert torch.equal(value_cache[where], value[kept])
        key_cache[where], value_cache[where] = 0, 0
        assert not pool.any()


def test_float16_and_odd_heads_go_to_the_reference_loudly(cpu):
    native = CpuAttention(cpu._library)
    with pytest.warns(RuntimeWarning, match="float16"):
        make_case(MIXED, dtype=torch.float16).check(native)
    assert native.notice is not None
    other = CpuAttention(cpu._library)
    with pytest.warns(RuntimeWarning, match="heads of 16 to 256"):
        make_case(MIXED, dtype=torch.float32, head_dim=24).check(other)


def test_a_wrong_cache_is_refused(cpu):
    case = make_case([(1, 5)], dtype=torch.float32)
    with pytest.raises(AssertionError):
        cpu.attend(case.spec, case.query, case.key_cache[:, :, :1], case.value_cache, case.batch)
