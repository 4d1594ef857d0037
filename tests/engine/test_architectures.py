"""The table has a test for each of its rows, and a row that is not the model's is found out."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.core.config import EngineConfig
from penstock.core.errors import StartupFailed
from penstock.engine import lift
from penstock.engine.architectures import ARCHITECTURES, RotaryTable, WindowSource
from penstock.engine.hugging_face import HuggingFaceModel
from penstock.engine.kernels import NormKind
from penstock.engine.loading import load_model
from tests.engine.tiny_models import DECLARED, UNDECLARED, save_model


def test_every_row_is_tested() -> None:
    assert {name.split("-")[0] for name in DECLARED} == set(ARCHITECTURES)
    # OLMoE leaves its row when it clips; the others have none.
    assert not set(UNDECLARED) & set(ARCHITECTURES)


WRONG = [
    ("llama", {"rotary_table": RotaryTable.ADJACENT}),
    ("llama", {"norm_offset": 0.1, "norm_kind": NormKind.RMS}),
    ("qwen3", {"query_norm": None}),
    ("qwen3", {"norm_after_rotary": True}),
    ("ministral", {"window": WindowSource.NONE}),
    ("ministral", {"window": WindowSource.CONFIG}),
    ("gemma2", {"softcap": None}),
    ("gemma2", {"mlp_output_norm": None}),
    ("gemma3_text", {"embedding_multiplier": None}),
    ("granite", {"residual_multiplier": None}),
    ("granite", {"logits_divisor": None}),
    ("gpt_oss", {"sinks": None}),
    ("smollm3", {"has_rotary": None}),
    ("cohere", {"is_parallel": False, "mlp_norm": "input_layernorm"}),
    ("arcee", {"is_gated": True}),
    ("olmo2", {"norm_spans_heads": False}),
    ("phi3", {"gate_up": ("up_gate_proj",)}),
    ("llama", {"norm_eps": "epsilon"}),
    ("gpt_oss", {"sinks": "drains"}),
]


@pytest.mark.parametrize(("name", "change"), WRONG, ids=[f"{n}-{next(iter(c))}" for n, c in WRONG])
def test_a_wrong_row_falls_back_to_hugging_face_and_says_so(
    name: str,
    change: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save_model(tmp_path, name)
    wrong = replace(ARCHITECTURES[name], **change)
    monkeypatch.setitem(lift.ARCHITECTURES, name, wrong)
    with caplog.at_level(logging.WARNING, "penstock"):
        model = load_model(EngineConfig(model=str(tmp_path), dtype="bfloat16"), lambda *_: None)
    assert isinstance(model.forward, HuggingFaceModel)
    assert "Hugging Face's own code runs it" in caplog.text
    with pytest.raises(StartupFailed, match="--model-impl transformers"):
        load_model(EngineConfig(model=str(tmp_path), model_impl="penstock"), lambda *_: None)


def test_a_config_that_steps_out_of_its_row_is_undeclared(tmp_path: Path) -> None:
    save_model(tmp_path, "olmoe", clip_qkv=1.0)
    model = load_model(EngineConfig(model=str(tmp_path), dtype="float32"), lambda *_: None)
    assert isinstance(model.forward, HuggingFaceModel)
