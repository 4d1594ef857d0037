"""Every declared architecture, paged and chunked: greedy tokens equal Hugging Face's in float32."""

from itertools import chain
from pathlib import Path

import pytest

from penstock.core.block import KVGroup
from penstock.core.config import EngineConfig
from penstock.engine.decoder import Decoder, group_layers, place_layers
from penstock.engine.loading import load_model
from tests.engine.harness import generate
from tests.engine.tiny_models import DECLARED, hugging_face_tokens, save_model, tokens

PROMPTS = [tokens(45), tokens(3), tokens(33)]
MAX_TOKENS = 10


@pytest.mark.parametrize("name", DECLARED)
def test_tokens_equal_hugging_face(name: str, tmp_path: Path) -> None:
    wanted = hugging_face_tokens(save_model(tmp_path, name), PROMPTS, MAX_TOKENS)
    config = EngineConfig(
        model=str(tmp_path), dtype="float32", block_size=16, model_impl="penstock"
    )
    model = load_model(config, lambda *_: None)

    assert isinstance(model.forward, Decoder)
    assert generate(model, PROMPTS[:1], MAX_TOKENS) == wanted[:1]
    assert generate(model, PROMPTS, MAX_TOKENS, chunk=7) == wanted


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe"])
def test_bfloat16_tokens_do_not_depend_on_batch_or_chunks(name: str, tmp_path: Path) -> None:
    save_model(tmp_path, name, initializer_range=0.3)
    config = EngineConfig(model=str(tmp_path), dtype="bfloat16")
    model = load_model(config, lambda *_: None)

    alone = [generate(model, [prompt], 3, block_size=32)[0] for prompt in PROMPTS]
    together = generate(model, PROMPTS, 3, block_size=32, chunk=9)
    # Rounding may send a near-tie either way, and what follows it: most must agree all the same.
    same = sum(a == b for a, b in zip(chain(*alone), chain(*together), strict=True))
    assert same >= 7, (alone, together)


def test_layers_with_the_same_window_share_a_group() -> None:
    groups = group_layers([0, 8, 0, 8, 16])
    assert groups == (KVGroup((0, 2), 0), KVGroup((1, 3), 8), KVGroup((4,), 16))
    assert place_layers(groups) == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0)]


def test_shortened_windows_leave_full_attention_alone(tmp_path: Path) -> None:
    save_model(tmp_path, "ministral")
    config = EngineConfig(model=str(tmp_path), dtype="float32")
    decoder = load_model(config, lambda *_: None).forward
    assert [spec.window for spec in decoder.attention] == [10, 0, 10, 0]
    shorter = decoder.with_windows_below(4)
    assert [spec.window for spec in shorter.attention] == [4, 0, 4, 0]
    assert [spec.window for spec in decoder.attention] == [10, 0, 10, 0]


def test_a_window_longer_than_the_context_is_none(tmp_path: Path) -> None:
    save_model(tmp_path, "mistral", sliding_window=100)
    config = EngineConfig(model=str(tmp_path), dtype="float32", max_model_len=100)
    assert {spec.window for spec in load_model(config, lambda *_: None).forward.attention} == {0}
