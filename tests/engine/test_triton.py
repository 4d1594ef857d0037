"""What the Triton kernels become on Hopper: compiled here, without a GPU, and read as machine code.

No spills; matrix instructions of warp groups in prefill; 16 bytes at a time where bytes are moved.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = dict[str, list[dict[str, int | str]]]
REGISTERS_MAX = 255


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> CODE:
    """Compile every launch, by name."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        # Nothing is taken from earlier runs: compiling is what is tested.
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "PYTHONWARNINGS": "error",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.triton.launches"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def _of(codes: CODE, name: str) -> dict[str, int | str]:
    return codes[name][0]


@pytest.mark.slow
def test_nothing_spills(codes):
    for name, kernels in codes.items():
        for code in kernels:
            assert code["spills"] == code["stack_bytes"] == 0, (name, code)
            assert code["registers"] <= REGISTERS_MAX, (name, code)
            # Two programs fit a multiprocessor's 227 KiB, save where heads are of 256.
            assert code["shared_bytes"] <= (227 << 10) // (1 if "256" in name else 2), (name, code)


@pytest.mark.slow
def test_prefill_multiplies_by_warp_groups(codes):
    for name in codes:
        if name.startswith("prefill"):
            code = _of(codes, name)
            assert code["warp_group_products"] > 0, (name, code)
            assert code["warp_products"] == 0, (name, code)


@pytest.mark.slow
def test_decode_multiplies_by_matrix_instructions(codes):
    assert _of(codes, "decode")["warp_products"] > 0
    # Exact products in float32 are none of the matrix units'.
    exact = _of(codes, "decode, float32")
    assert exact["warp_products"] == exact["warp_group_products"] == 0


@pytest.mark.slow
def test_keys_and_values_come_16_bytes_at_a_time_and_ahead(codes):
    for name in codes:
        if not name.startswith(("prefill", "decode")):
            continue
        code = _of(codes, name)
        # The narrow ones fetch block numbers.
        assert code["wide_async_copies"] > code["narrow_async_copies"], (name, code)
        assert code["wide_stores"] > 0, (name, code)


@pytest.mark.slow
def test_sampling_reads_logits_16_bytes_at_a_time(codes):
    kernels = codes["sampling"]
    assert len(kernels) == 4
    for code in kernels:
        assert code["wide_loads"] > 0, code


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "narrow_loads_max"),
    # The two narrow ones of heads fetch positions and slots.
    [("heads of many rows", 2), ("heads of few rows", 2), ("norm", 0), ("activation", 0)],
)
def test_rows_are_read_and_written_16_bytes_at_a_time(codes, name, narrow_loads_max):
    code = _of(codes, name)
    assert code["wide_loads"] > 0, code
    assert code["narrow_loads"] <= narrow_loads_max, code
    assert code["wide_stores"] > 0, code
    assert code["narrow_stores"] == 0, code


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["int8 encode", "int4 encode", "int4 encode, float32", "fp8 encode"]
)
def test_encoders_read_numbers_and_write_codes_16_bytes_at_a_time(codes, name):
    code = _of(codes, name)
    assert code["wide_loads"] >= 4, code
    # The narrow ones fetch the block's number and store low and scale.
    assert code["narrow_loads"] == 1, code
    assert code["wide_stores"] >= 2, code
    assert code["narrow_stores"] <= 6, code


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8 decode", "int4 decode", "fp8 decode"])
def test_decoders_read_codes_and_write_numbers_16_bytes_at_a_time(codes, name):
    code = _of(codes, name)
    assert code["wide_loads"] >= 2, code
    assert code["narrow_loads"] <= 7, code
    assert code["wide_stores"] >= 4, code
    assert code["narrow_stores"] == 0, code


@pytest.mark.slow
def test_digests_read_blocks_16_bytes_at_a_time_and_sums_several_steps_ahead(codes):
    sums, steps = codes["digest"]
    assert sums["wide_loads"] >= 4, sums
    # The block's number, and the secret.
    assert sums["narrow_loads"] <= 2, sums
    assert steps["wide_loads"] >= 8, steps
