"""Linear layers in every packing against float64."""

import pytest
import torch

from penstock.engine import linear
from penstock.engine.linear import Linear, Packing, can_use_onednn, choose_packing
from penstock.engine.native.library import Loaded, load_library

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
PACKINGS = pytest.mark.parametrize("packing", list(Packing), ids=lambda packing: packing.value)


def make_packed(packing, weight, bias=None, **options):
    """Pack a weight, or skip where this machine's oneDNN does not take its type."""
    if packing is Packing.ONEDNN and not can_use_onednn(weight.dtype):
        pytest.skip(f"oneDNN packs no {weight.dtype} on this CPU")
    return Linear(weight, bias, packing=packing, **options)


def make(out_features, in_features, dtype, *, bias=True, seed=0):
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=rng).to(dtype)
    return weight, torch.randn(out_features, generator=rng).to(dtype) if bias else None


def check(layer, weight, bias, x):
    """Compare with float64: sums are taken in float32 and rounded once, to the output's type."""
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    result = layer(x)
    assert result.dtype == layer.out_dtype
    assert result.shape == expected.shape
    rounding = 4e-3 if result.dtype is torch.bfloat16 else 1e-7
    error = (result.double() - expected).abs() - rounding * expected.abs()
    assert error.max().item() < 1e-5 + 3e-7 * weight.shape[1], error.max()


def rows_of(count, width, dtype):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count)).to(dtype)


@DTYPES
@PACKINGS
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("out_features", "in_features"),
    [(64, 64), (1, 16), (65, 128), (130, 2), (200, 2600), (513, 48)],
)
def test_product(dtype, packing, bias, out_features, in_features):
    weight, offset = make(out_features, in_features, dtype, bias=bias)
    layer = make_packed(packing, weight, offset)
    for rows in (1, 2, 5, 6, 7, 12, 13, 33, 200):
        check(layer, weight, offset, rows_of(rows, in_features, dtype))


@DTYPES
def test_many_rows_make_several_blocks(dtype):
    weight, bias = make(96, 320, dtype)
    layer = Linear(weight, bias, packing=Packing.NATIVE)
    check(layer, weight, bias, rows_of(1000, 320, dtype))


@PACKINGS
def test_logits_stay_unrounded(packing):
    weight, bias = make(100, 64, torch.bfloat16)
    layer = make_packed(packing, weight, bias, out_dtype=torch.float32)
    x = rows_of(9, 64, torch.bfloat16)
    assert layer(x).dtype is torch.float32
    if packing is Packing.NATIVE:  # the others round to bfloat16 first
        check(layer, weight, bias, x)


@DTYPES
def test_a_row_does_not_depend_on_its_batch(dtype):
    weight, bias = make(192, 256, dtype)
    layer = Linear(weight, bias, packing=Packing.NATIVE)
    x = torch.randn(300, 256).to(dtype)
    whole = layer(x)
    for rows in (1, 3, 8, 17):
        assert torch.equal(layer(x[40 : 40 + rows]), whole[40 : 40 + rows])


@DTYPES
def test_threads_change_nothing(dtype):
    weight, bias = make(300, 128, dtype)
    x = torch.randn(50, 128).to(dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(Linear(weight, bias, packing=Packing.NATIVE)(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@DTYPES
@PACKINGS
def test_rows_come_back_as_they_were(dtype, packing):
    weight, bias = make(130, 48, dtype)
    layer = make_packed(packing, weight, bias)
    ids = torch.tensor([0, 129, 64, 63, 5, 5])
    assert torch.equal(layer.rows(ids), weight[ids])
    assert torch.equal(layer.table, weight)


@DTYPES
@PACKINGS
def test_any_shape_and_strides(dtype, packing):
    weight, _ = make(33, 32, dtype, bias=False)
    # A transposed checkpoint and an input that is a slice of something wider.
    layer = make_packed(packing, weight.T.contiguous().T)
    x = torch.randn(2, 3, 64).to(dtype)[..., 16:48]
    check(layer, weight, None, x)
    assert layer(x[:0]).shape == (0, 3, 33)


def test_stacked_products_lie_side_by_side():
    first, second = make(48, 32, torch.float32), make(17, 32, torch.float32, bias=False, seed=1)
    layer, x = Linear.stacked(first, second), torch.randn(4, 32)
    expected = torch.cat([Linear(*first)(x), Linear(*second)(x)], 1)
    torch.testing.assert_close(layer(x), expected)


def test_the_packing_fits_weight_and_machine(monkeypatch):
    small, large = torch.zeros(64, 64).bfloat16(), torch.zeros(1024, 1024).bfloat16()
    odd = torch.zeros(4, 3).bfloat16()
    for supported, packed in ((True, Packing.ONEDNN), (False, Packing.PLAIN)):
        monkeypatch.setattr(linear, "can_use_onednn", lambda _, supported=supported: supported)
        assert choose_packing(odd) is packed
    monkeypatch.setattr(linear, "can_use_onednn", lambda _: True)
    monkeypatch.setattr(linear, "_has_matrix_instructions", lambda: False)
    assert choose_packing(small) is choose_packing(large) is Packing.NATIVE
    assert choose_packing(odd) is Packing.ONEDNN
    assert choose_packing(small.half()) is Packing.PLAIN
    assert choose_packing(small.to("meta")) is Packing.PLAIN
    monkeypatch.setattr(linear, "_has_matrix_instructions", lambda: True)
    assert choose_packing(small) is Packing.NATIVE
    assert choose_packing(large) is Packing.ONEDNN
    assert choose_packing(large.float()) is Packing.NATIVE
    monkeypatch.setattr(linear, "load_library", lambda: Loaded(None, "no compiler"))
    assert choose_packing(small) is Packing.ONEDNN


def test_a_torch_that_cannot_pack_is_said_aloud(monkeypatch):
    monkeypatch.setattr(linear, "load_library", lambda: Loaded(None, "no compiler"))
    monkeypatch.setattr(torch._C, "_has_mkldnn", False)
    linear._has_onednn.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="cannot pack weights"):
            layer = Linear(torch.ones(4, 4))
    finally:
        monkeypatch.undo()
        linear._has_onednn.cache_clear()
    assert layer.packing is Packing.PLAIN
    assert torch.equal(layer(torch.ones(1, 4)), torch.full((1, 4), 4.0))


def test_a_wrong_input_is_refused():
    assert load_library().library is not None
    layer = Linear(torch.zeros(16, 16), packing=Packing.NATIVE)
    with pytest.raises(AssertionError):
        layer(torch.zeros(2, 15))
    with pytest.raises(AssertionError):
        layer(torch.zeros(2, 16).bfloat16())
