"""The native operations, recorded and run as programs, against the torch reference."""

from dataclasses import replace

import pytest
import torch

from penstock.engine.attention import AttentionSpec
from penstock.engine.batch import Batch
from penstock.engine.device import CPU, find_device
from penstock.engine.kernels import Activation, HeadsSpec, Norm, NormKind, Rotary
from penstock.engine.kernels.cpu import CpuKernels
from penstock.engine.kernels.reference import ReferenceKernels
from penstock.engine.kernels.select import select_kernels
from penstock.engine.linear import Linear, Packing, can_use_onednn
from penstock.engine.native.library import load_library

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

WIDTH = 160


@pytest.fixture(scope="module")
def cpu() -> CpuKernels:
    library = load_library().library
    assert library is not None, "the tests need a C++ compiler"
    return CpuKernels(library)


def make_batch(num_rows: int, selected: list[int] | None = None, block_size: int = 16) -> Batch:
    """Make one sequence of `num_rows` new tokens whose blocks are 1, 2, ..."""
    rng = torch.Generator().manual_seed(num_rows)
    slots = torch.arange(num_rows) + block_size
    slots[1::5] = -1
    num_blocks = -(-num_rows // block_size)
    return Batch(
        token_ids=torch.randint(0, 96, (num_rows,), generator=rng),
        positions=torch.randint(0, 400, (num_rows,), generator=rng),
        slots=(slots,),
        query_start=torch.tensor([0, num_rows], dtype=torch.int32),
        kv_len=torch.tensor([num_rows], dtype=torch.int32),
        block_tables=(torch.arange(1, num_blocks + 1, dtype=torch.int32)[None],),
        logits_rows=torch.tensor(selected or [], dtype=torch.int64),
        max_query_len=num_rows,
    )


def compare(cpu, forward, batch, *, tolerance=None):
    """Run a forward natively and by torch; the results agree to a rounding of their type."""
    program = cpu.prepare(forward)
    expected = ReferenceKernels().prepare(forward)(batch)
    for _ in range(2):  # the second run meets used registers
        result = program(batch)
        assert result.dtype == expected.dtype
        assert result.shape == expected.shape
        if tolerance is None:
            tolerance = 1e-5 if result.dtype is torch.float32 else 8e-3
        torch.testing.assert_close(result, expected, atol=tolerance, rtol=tolerance)


def table(dtype, width=WIDTH, rows=96):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(7)).to(dtype)


@DTYPES
@pytest.mark.parametrize("width", [160, 2048, 24, 7])
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_embed(cpu, dtype, width, scale):
    plain = table(dtype, width)
    compare(cpu, lambda k, b: k.embed(plain, b, scale), make_batch(40))


def require(packing, dtype):
    """Skip where this machine's oneDNN does not take weights of a type."""
    if packing is Packing.ONEDNN and not can_use_onednn(dtype):
        pytest.skip(f"oneDNN packs no {dtype} on this CPU")


@DTYPES
@pytest.mark.parametrize("packing", list(Packing))
def test_embed_from_a_tied_head(cpu, dtype, packing):
    plain = table(dtype)
    require(packing, dtype)
    tied = Linear(plain, out_dtype=torch.float32, packing=packing)
    batch = make_batch(20)
    program = cpu.prepare(lambda k, b: k.embed(tied, b, 2.0))
    assert torch.equal(program(batch), plain[batch.token_ids] * 2)


@DTYPES
@pytest.mark.parametrize("kind", list(NormKind))
@pytest.mark.parametrize("width", [64, 160, 2048, 23])
def test_norm(cpu, dtype, kind, width):
    weight, bias = torch.rand(2, width)
    for norm in [
        Norm(kind, weight.to(dtype), 1e-6),
        Norm(kind, None, 1e-5),
        Norm(kind, weight, 1e-5, bias=bias),
    ]:
        compare(cpu, lambda k, b, n=norm: k.norm(k.embed(table(dtype, width), b), n), make_batch(9))


def test_norms_have_the_rounding_of_hugging_face(cpu):
    weight, x = torch.rand(WIDTH).bfloat16(), table(torch.bfloat16)
    batch = make_batch(300)
    rows = x[batch.token_ids].float()
    wide = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-6)
    expected = {
        # Llama rounds before the product with the weight; Gemma's weight is an offset from 1, and
        # multiplied in float32.
        NormKind.RMS_LLAMA: weight * wide.bfloat16(),
        NormKind.RMS: (wide * (1 + weight.float())).bfloat16(),
    }
    for kind, wanted in expected.items():
        norm = Norm(kind, weight if kind is NormKind.RMS_LLAMA else 1 + weight.float(), 1e-6)
        result = cpu.prepare(lambda k, b, n=norm: k.norm(k.embed(x, b), n))(batch)
        # The last bit of a mean decides a rounding now and then; the wrong order, every fourth.
        assert (result == wanted).float().mean() > 0.99


@DTYPES
@pytest.mark.parametrize("scale", [1.0, 0.22])
@pytest.mark.parametrize("rows", [1, 300])
def test_add_and_add_norm(cpu, dtype, scale, rows):
    a, b = table(dtype), table(dtype).flip(0)
    norm = Norm(NormKind.RMS_LLAMA, torch.rand(WIDTH).to(dtype), 1e-6)

    def summed(k, batch):
        return k.add(k.embed(a, batch), k.embed(b, batch), scale)

    def total_and_norm(k, batch):
        total, normed = k.add_norm(k.embed(a, batch), k.embed(b, batch), norm, scale)
        return k.add(total, normed)

    compare(cpu, summed, make_batch(rows))
    compare(
        cpu, total_and_norm, make_batch(rows), tolerance=None if dtype is torch.float32 else 3e-2
    )


@DTYPES
@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("gated", [False, True])
def test_activate(cpu, dtype, activation, gated):
    wide = table(dtype) * 6
    compare(cpu, lambda k, b: k.activate(k.embed(wide, b), activation, gated=gated), make_batch(33))


@DTYPES
def test_activations_survive_large_numbers(cpu, dtype):
    extreme = torch.tensor([[-1e30, -1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4]]).to(dtype)
    batch = replace(make_batch(1), token_ids=torch.zeros(1, dtype=torch.int64))
    for activation in (Activation.SILU, Activation.GELU, Activation.GELU_TANH, Activation.RELU):
        result = cpu.prepare(
            lambda k, b, a=activation: k.activate(k.embed(extreme, b), a, gated=False)
        )(batch)
        expected = ReferenceKernels().activate(extreme, activation, gated=False)
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


@DTYPES
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.25, 0.0), (2.0, 30.0)])
def test_cap(cpu, dtype, scale, softcap):
    compare(cpu, lambda k, b: k.cap(k.embed(table(dtype), b), scale, softcap), make_batch(3))


@DTYPES
@pytest.mark.parametrize("packing", list(Packing))
def test_select_rows_then_linear(cpu, dtype, packing):
    require(packing, dtype)
    weight = table(dtype, WIDTH, 100) / WIDTH**0.5
    linear = Linear(weight, torch.randn(100).to(dtype), packing=packing)

    def forward(k, batch):
        x = k.linear(linear, k.select_rows(k.embed(table(dtype), batch), batch))
        return k.cap(x, 1.0, 0.0)

    for selected in ([0], [3, 17, 39], list(range(40)), []):
        compare(
            cpu,
            forward,
            make_batch(40, selected),
            tolerance=1e-5 if dtype is torch.float32 else 2e-2,
        )


@DTYPES
def test_apply_breaks_a_program_and_goes_on(cpu, dtype):
    seen = []

    def double(x):
        seen.append(x.shape)
        return x * 2

    def forward(k, batch):
        x = k.embed(table(dtype), batch)
        y = k.apply(double, k.add(x, x))
        z = k.apply(torch.relu, k.select_rows(y, batch))
        return k.add(z, z)

    compare(cpu, forward, make_batch(12, [2, 5]))
    assert seen[0] == (12, WIDTH)
    # Torch code may come last, too.
    compare(cpu, lambda k, b: k.apply(torch.relu, k.embed(table(dtype), b)), make_batch(5))


def heads_case(dtype, *, num_heads=4, num_kv_heads=2, head_dim=32, **options):
    """Return a forward through `heads` and `attend`, with a cache of its own for each call."""
    spec = HeadsSpec(
        AttentionSpec(0, 0, num_heads, num_kv_heads, head_dim, head_dim**-0.5), **options
    )
    qkv = table(dtype, (num_heads + 2 * num_kv_heads) * head_dim)

    def run(kernels, batch):
        pool = torch.zeros(30, 2, 16, num_kv_heads, head_dim, dtype=dtype)
        caches = pool[:, 0], pool[:, 1]
        program = kernels.prepare(lambda k, b: k.heads(spec, k.embed(qkv, b), *caches, b))
        query = program(batch).view(-1, num_heads, head_dim)
        return query, pool

    return run


def rotary(width, *, interleaved=False):
    angles = torch.outer(torch.arange(400.0), 10000 ** -(torch.arange(0, width, 2) / width))
    return Rotary(angles.cos(), angles.sin(), interleaved)


def head_norm(dtype, size, kind=NormKind.RMS_LLAMA):
    return Norm(kind, (torch.rand(size) + 0.5).to(dtype), 1e-6)


HEADS = {
    "no positions": lambda dtype: {},
    "half": lambda dtype: {"rotary": rotary(32)},
    "interleaved": lambda dtype: {"rotary": rotary(32, interleaved=True)},
    "partial": lambda dtype: {"rotary": rotary(20)},
    "partial interleaved": lambda dtype: {"rotary": rotary(16, interleaved=True)},
    "head norms": lambda dtype: {
        "rotary": rotary(32),
        "query_norm": head_norm(dtype, 32),
        "key_norm": head_norm(dtype, 32),
    },
    "head norms without weight, after": lambda dtype: {
        "rotary": rotary(32),
        "query_norm": Norm(NormKind.RMS, None, 1e-6),
        "key_norm": Norm(NormKind.RMS, None, 1e-6),
        "norm_after_rotary": True,
    },
    "one norm over all heads": lambda dtype: {
        "rotary": rotary(32),
        "query_norm": head_norm(dtype, 128),
        "key_norm": head_norm(dtype, 64),
        "norm_spans_heads": True,
    },
    "a norm for each head": lambda dtype: {
        "rotary": rotary(32, interleaved=True),
        "query_norm": head_norm(dtype, 128, NormKind.LAYER),
        "key_norm": head_norm(dtype, 64, NormKind.LAYER),
    },
    "queries alone": lambda dtype: {"query_norm": head_norm(dtype, 32)},
}


@DTYPES
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("rows", [1, 60, 400])
def test_heads(cpu, dtype, name, rows):
    run = heads_case(dtype, **HEADS[name](dtype))
    batch = make_batch(rows)
    (query, pool), (expected, expected_pool) = run(cpu, batch), run(ReferenceKernels(), batch)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(query, expected.view(query.shape), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(pool, expected_pool, atol=tolerance, rtol=tolerance)


@DTYPES
def test_a_whole_layer_grows_and_shrinks(cpu, dtype):
    width, heads = 64, AttentionSpec(0, 0, 4, 2, 32, 32**-0.5)
    spec = HeadsSpec(heads, rotary(32))
    rng = torch.Generator().manual_seed(3)

    def weight(rows, columns):
        return (torch.randn(rows, columns, generator=rng) / columns**0.5).to(dtype)

    embedding, norm = weight(96, width) * 8, Norm(NormKind.RMS_LLAMA, torch.ones(width), 1e-6)
    qkv, out = Linear(weight(256, width)), Linear(weight(width, 128))
    gate_up, down = Linear(weight(2 * 96, width)), Linear(weight(width, 96))
    head = Linear(weight(200, width), out_dtype=torch.float32)
    pool = torch.zeros(40, 2, 16, 2, 32, dtype=dtype)

    def forward(k, batch):
        x = k.embed(embedding, batch)
        query = k.heads(spec, k.linear(qkv, k.norm(x, norm)), pool[:, 0], pool[:, 1], batch)
        attended = k.attend(heads, query, pool[:, 0], pool[:, 1], batch)
        x, normed = k.add_norm(x, k.linear(out, attended), norm)
        inner = k.activate(k.linear(gate_up, normed), Activation.SILU, gated=True)
        x, normed = k.add_norm(x, k.linear(down, inner), norm)
        return k.cap(k.linear(head, k.select_rows(normed, batch)), 1.0, 0.0)

    program, reference = cpu.prepare(forward), ReferenceKernels().prepare(forward)
    for rows in (3, 500, 1, 40):
        batch = make_batch(rows, [rows - 1, 0])
        batch.slots[0][:] = torch.arange(rows) + 16
        tolerance = 2e-5 if dtype is torch.float32 else 6e-2
        torch.testing.assert_close(program(batch), reference(batch), atol=tolerance, rtol=tolerance)


def test_results_are_not_overwritten_by_the_next_run(cpu):
    plain = table(torch.float32)
    program = cpu.prepare(lambda k, b: k.embed(plain, b))
    first = program(make_batch(4))
    kept = first.clone()
    program(make_batch(6))
    assert torch.equal(first, kept)


def test_registers_are_reused(cpu):
    plain = table(torch.float32)

    def forward(k, batch):
        x = k.embed(plain, batch)
        for _ in range(20):
            x = k.add(x, x)
        return x

    program = cpu.prepare(forward)
    assert len(program._row_bytes) <= 2
    compare(cpu, forward, make_batch(3), tolerance=1e-3)


def test_a_layer_that_is_not_native_runs_on_torch_loudly():
    kernels = select_kernels(CPU, torch.float32)
    run = heads_case(torch.float32, head_dim=24)
    with pytest.warns(RuntimeWarning, match="heads of 16 to 256"):
        query, _ = run(kernels, make_batch(5))
    assert query.shape == (5, 4, 24)
    assert "24" in kernels.notice


def test_selection():
    assert select_kernels(CPU, torch.bfloat16).name == "cpu"
    assert select_kernels(CPU, torch.bfloat16).notice is None
    with pytest.warns(RuntimeWarning, match="float16"):
        assert select_kernels(CPU, torch.float16).notice is not None
    assert select_kernels(find_device("interpreter"), torch.float32).name == "triton"
