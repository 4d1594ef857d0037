"""How KV memory is split among groups, and the shape of blocks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from penstock.core.block import KVGroup, KVLayout
from penstock.core.config import EngineConfig
from penstock.core.errors import StartupFailed
from penstock.engine.loading import load_model
from penstock.engine.model import layout_of, num_blocks
from tests.engine.tiny_models import save_model

FULL = KVGroup((0, 1, 2))
SLIDING = KVGroup((3, 4), 64)
LIMITS = {"max_num_seqs": 4, "max_num_batched_tokens": 128}
SLIDING_MOST = 4 * ((64 + 128) // 32 + 1)


def make_layout(*groups: KVGroup) -> KVLayout:
    return KVLayout("m", groups, 2, 16, 32, "bfloat16")


def spent(layout: KVLayout, counts: tuple[int, ...]) -> int:
    return sum(n * size for n, size in zip(counts, layout.block_bytes, strict=True))


def test_one_group_gets_everything() -> None:
    layout = make_layout(FULL)
    size = layout.block_bytes[0]
    assert num_blocks(layout, 10 * size + size - 1, **LIMITS) == (10,)


def test_groups_share_alike_while_memory_is_short() -> None:
    layout = make_layout(FULL, SLIDING)
    budget = 20 * sum(layout.block_bytes)
    assert num_blocks(layout, budget, **LIMITS) == (20, 20)


def test_a_sliding_group_gets_no_more_than_can_be_seen() -> None:
    layout = make_layout(SLIDING, FULL)
    budget = 100 * sum(layout.block_bytes)
    counts = num_blocks(layout, budget, **LIMITS)
    assert counts[0] == SLIDING_MOST
    assert counts[1] > 100
    assert 0 <= budget - spent(layout, counts) < layout.block_bytes[1]


def test_sliding_groups_alone_leave_memory_unused() -> None:
    layout = make_layout(SLIDING, KVGroup((5,), 32))
    counts = num_blocks(layout, 1 << 40, **LIMITS)
    assert counts == (SLIDING_MOST, 4 * ((32 + 128) // 32 + 1))


def test_too_little_memory_is_refused() -> None:
    layout = make_layout(FULL, SLIDING)
    with pytest.raises(StartupFailed, match="--kv-cache-bytes 5000"):
        num_blocks(layout, 5000, **LIMITS)


def test_layout_of_a_model_with_windows(tmp_path: Path) -> None:
    save_model(tmp_path, "gemma3_text")
    model = load_model(EngineConfig(model=str(tmp_path), dtype="float32"), lambda *_: None)
    layout = model.layout(64)
    assert layout.groups == (KVGroup((0, 2), 10), KVGroup((1, 3)))
    assert (layout.block_size, layout.dtype) == (64, "float32")
    assert layout.fingerprint() != model.layout(32).fingerprint()


def test_layers_that_differ_in_shape_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    model = load_model(EngineConfig(model=str(tmp_path), dtype="float32"), lambda *_: None)
    layers = list(model.forward.layers)
    heads = layers[1].heads
    odd = replace(heads, attention=replace(heads.attention, head_dim=32))
    layers[1] = replace(layers[1], heads=odd)
    with pytest.raises(StartupFailed, match="differ in KV heads"):
        layout_of(replace(model.forward, layers=tuple(layers)), "m", "float32", 32)


def test_identity_is_that_of_the_weights(tmp_path: Path) -> None:
    def identity(folder: Path, **changes: object) -> str:
        config = EngineConfig(model=str(folder), dtype="float32", **changes)
        return load_model(config, lambda *_: None).identity

    model = save_model(tmp_path / "a", "llama")
    model.save_pretrained(tmp_path / "b")
    assert identity(tmp_path / "a") == identity(tmp_path / "b")
    assert identity(tmp_path / "a", load_format="dummy") != identity(tmp_path / "a")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    model.save_pretrained(tmp_path / "b")
    assert identity(tmp_path / "a") != identity(tmp_path / "b")
