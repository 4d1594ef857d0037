"""Undeclared architectures run in Hugging Face's own code, over block pools: the same tokens."""

from pathlib import Path

import pytest

from penstock.core.config import EngineConfig
from penstock.core.errors import StartupFailed
from penstock.engine.hugging_face import HuggingFaceModel
from penstock.engine.loading import load_model
from tests.engine.harness import generate
from tests.engine.tiny_models import UNDECLARED, hugging_face_tokens, save_model, tokens

PROMPTS = [tokens(45), tokens(3), tokens(33)]
MAX_TOKENS = 10


@pytest.mark.parametrize("name", [*UNDECLARED, "llama", "gemma3_text", "gpt_oss"])
def test_tokens_equal_hugging_face(name: str, tmp_path: Path) -> None:
    wanted = hugging_face_tokens(save_model(tmp_path, name), PROMPTS, MAX_TOKENS)
    impl = "auto" if name in UNDECLARED else "transformers"
    config = EngineConfig(model=str(tmp_path), dtype="float32", block_size=16, model_impl=impl)
    model = load_model(config, lambda *_: None)

    assert isinstance(model.forward, HuggingFaceModel)
    assert generate(model, PROMPTS[:1], MAX_TOKENS) == wanted[:1]
    assert generate(model, PROMPTS, MAX_TOKENS, chunk=7) == wanted


def test_windows_are_those_of_the_calls(tmp_path: Path) -> None:
    # EXAONE 4 modules have a window that only some of them apply.
    save_model(tmp_path, "exaone4")
    config = EngineConfig(model=str(tmp_path), dtype="float32")
    model = load_model(config, lambda *_: None)
    assert [spec.window for spec in model.forward.attention] == [10, 0, 10, 0]


def test_models_that_compute_attention_themselves_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "bloom", n_layer=2, n_head=4)
    with pytest.raises(StartupFailed, match="bloom"):
        load_model(EngineConfig(model=str(tmp_path), dtype="float32"), lambda *_: None)
