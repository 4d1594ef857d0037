"""Names and sizes of blocks."""

import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from penstock.core.block import KVGroup, KVLayout, accepts_loss, extend_hashes, root_hash
from penstock.core.types import BlockHash

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=200)


def hashes_of(tokens: list[int], block_size: int = 16, salt: str = "") -> list[BlockHash]:
    hashes: list[BlockHash] = []
    extend_hashes(hashes, tokens, block_size, salt)
    return hashes


@given(TOKENS, st.integers(0, 200))
def test_hashes_do_not_depend_on_how_the_tokens_came(tokens: list[int], cut: int) -> None:
    hashes = hashes_of(tokens[:cut])
    extend_hashes(hashes, tokens, 16, "")
    assert hashes == hashes_of(tokens)
    assert len(hashes) == len(tokens) // 16


@given(TOKENS, TOKENS)
def test_equal_names_mean_equal_prefixes(left: list[int], right: list[int]) -> None:
    for i, (a, b) in enumerate(zip(hashes_of(left), hashes_of(right), strict=False)):
        assert (a == b) == (left[: 16 * (i + 1)] == right[: 16 * (i + 1)])


def test_tenants_share_nothing() -> None:
    tokens = list(range(64))
    assert not set(hashes_of(tokens, salt="a")) & set(hashes_of(tokens, salt="b"))


def test_names_say_whether_loss_is_accepted_and_the_two_share_nothing() -> None:
    tokens = list(range(64))
    exact, lossy = hashes_of(tokens), []
    extend_hashes(lossy, tokens[:40], 16, "", accepts_loss=True)
    # What is appended later has it from its parent.
    extend_hashes(lossy, tokens, 16, "", accepts_loss=True)
    assert len(lossy) == len(exact) == 4
    assert all(accepts_loss(name) for name in lossy)
    assert not any(accepts_loss(name) for name in exact)
    assert not {name[:15] for name in exact} & {name[:15] for name in lossy}


def test_names_are_the_same_in_every_process() -> None:
    """Peers that hash with a per-process seed get no prefix hits across workers."""
    code = "from penstock.core.block import root_hash; print(root_hash('s').hex())"
    env = {"PYTHONHASHSEED": "123"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert run.stdout.strip() == root_hash("s").hex()


def test_sizes_of_llama_8b_in_bfloat16() -> None:
    layout = KVLayout("m", (KVGroup(tuple(range(32))),), 8, 128, 16, "bfloat16")
    assert layout.block_bytes == (2 * 1024 * 1024,)
    assert layout.token_bytes == 128 * 1024
    assert [layout.num_blocks(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_groups_have_their_own_block_size_and_fingerprints_tell_layouts_apart() -> None:
    groups = (KVGroup((0, 2)), KVGroup((1,), 128))
    layout = KVLayout("m", groups, 2, 64, 32, "float32")
    assert layout.block_bytes == (2 * 32768, 32768)
    others = [
        KVLayout("n", groups, 2, 64, 32, "float32"),
        KVLayout("m", groups, 2, 64, 16, "float32"),
        KVLayout("m", groups, 2, 64, 32, "bfloat16"),
        KVLayout("m", (KVGroup((0, 1, 2)),), 2, 64, 32, "float32"),
    ]
    assert len({layout.fingerprint(), *(other.fingerprint() for other in others)}) == 5


LAYOUT = KVLayout("m", (KVGroup((0, 2)), KVGroup((1,), 128)), 4, 64, 32, "float32")


@pytest.mark.parametrize(
    "other",
    [
        {"block_size": 16, "dtype": "bfloat16"},
        {"num_kv_heads": 2, "first_kv_head": 2, "total_kv_heads": 4},
    ],
)
def test_the_same_content_in_another_shape_is_compatible(other) -> None:
    other = replace(LAYOUT, **other)
    assert other.fingerprint() != LAYOUT.fingerprint()
    assert LAYOUT.incompatibility(other) is None
    assert other.incompatibility(LAYOUT) is None


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("model", {"model": "m at another revision"}),
        ("groups of layers", {"groups": LAYOUT.groups[:1]}),
        ("groups of layers", {"groups": (KVGroup((0, 2)), KVGroup((1,), 64))}),
        ("total_kv_heads", {"total_kv_heads": 8}),
        ("head_dim", {"head_dim": 32}),
    ],
)
def test_other_content_is_refused_with_both_fingerprints(field, other) -> None:
    other = replace(LAYOUT, **other)
    reason = LAYOUT.incompatibility(other)
    assert f"{field} is" in reason
    assert LAYOUT.fingerprint() in reason
    assert other.fingerprint() in reason


@pytest.mark.parametrize(
    "other",
    [
        {"block_size": 0},
        {"dtype": "int8"},
        {"num_kv_heads": -1},
        {"first_kv_head": -1, "total_kv_heads": 8},
        {"first_kv_head": 1},
        {"total_kv_heads": 3},
    ],
)
def test_a_shape_that_no_pool_has_is_no_layout(other) -> None:
    with pytest.raises(ValueError, match=r"KV heads|shape"):
        replace(LAYOUT, **other)
    row = msgspec.to_builtins({**msgspec.structs.asdict(LAYOUT), **other}).values()
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(list(row), KVLayout)


def test_capacity_is_that_of_the_full_attention_group() -> None:
    layout = KVLayout("m", (KVGroup((0, 2)), KVGroup((1,), 128)), 2, 64, 32, "float32")
    assert layout.capacity_tokens((10, 5)) == 320
    windowed = KVLayout("m", (KVGroup((0,), 128),), 2, 64, 32, "float32")
    assert windowed.capacity_tokens((5,)) == 160
