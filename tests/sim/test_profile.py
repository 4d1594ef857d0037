"""Hardware: found by name, and its step times by the formula."""

import pytest

from penstock.control.profiles import KERNEL_TIMES
from penstock.core.errors import BadRequest
from penstock.core.types import NS_PER_MS
from penstock.sim.profile import (
    Batches,
    Kind,
    Spread,
    StepTimes,
    find_hardware,
    layout_of,
    size_of,
)


def test_a_step_of_prompts_and_decodes_reads_the_weights_once() -> None:
    times = StepTimes(a=1.0, b=0.1, c=0.001, d=2.0, e=0.5, f=0.01)
    assert times.duration_ns(100, 100 * 100, 0, 0) == pytest.approx(21 * NS_PER_MS)
    assert times.duration_ns(0, 0, 4, 200) == pytest.approx(6 * NS_PER_MS)
    assert times.duration_ns(100, 100 * 100, 4, 200) == pytest.approx(26 * NS_PER_MS)


@pytest.mark.parametrize("profile", KERNEL_TIMES)
def test_every_profile_is_found_by_its_parts(profile: str) -> None:
    gpu, model, tp = profile.split("/")
    hardware = find_hardware(gpu.lower(), model, int(tp[2:]))
    assert hardware.profile == profile
    assert hardware.capacity_tokens == KERNEL_TIMES[profile][0]
    assert layout_of(model, 128).num_kv_heads == 8


def test_the_fewest_gpus_that_hold_the_model_are_taken() -> None:
    assert find_hardware("H100", "llama3.1-70b").tp == 4
    assert find_hardware("H200", "llama3.1-70b").tp == 2


def test_a_block_has_the_bytes_of_the_model() -> None:
    assert layout_of("llama3.1-8b", 16).token_bytes == 128 * 1024


def test_what_there_is_not_is_said() -> None:
    with pytest.raises(BadRequest, match="H200-tp2"):
        find_hardware("H300", "llama3.1-70b")
    with pytest.raises(BadRequest, match=r"models are llama3\.1-8b"):
        find_hardware("H100", "gpt-6")


def test_steps_are_as_uneven_as_the_nearest_size_of_their_kind() -> None:
    prompt, decode = Kind(True, False, False, 20), Kind(False, False, True, 20)
    larger = prompt._replace(size=24)
    spread = Spread({prompt: (1.1,), larger: (1.2,), decode: (2.0,)})
    assert spread.like(prompt._replace(size=21)) == (1.1,)
    assert spread.like(prompt._replace(size=30)) == (1.2,)
    assert spread.like(decode._replace(size=1)) == (2.0,)
    assert spread.like(prompt._replace(is_crowded=True)) == ()
    assert spread.like(decode._replace(has_newcomer=True)) == (2.0,)
    assert size_of(1023.0) == 10
    assert size_of(1024.0) == 11


def test_a_decode_that_the_step_before_did_not_have_is_a_newcomer() -> None:
    batches = Batches()
    assert not batches.has_newcomer([100], [0])
    assert batches.has_newcomer([1], [100])  # its prompt is complete: the first decode
    assert not batches.has_newcomer([1], [101])
    assert batches.has_newcomer([1, 1], [102, 102])  # one of the two
    assert not batches.has_newcomer([1, 1], [103, 103])
    assert not batches.has_newcomer([1], [104])  # the other has ended
    assert not batches.has_newcomer([50], [0])
    assert batches.has_newcomer([1], [105])  # it was left out for a step
