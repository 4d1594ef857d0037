"""What `load_model` reports, what it refuses, and what it leaves behind."""

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.core.config import EngineConfig
from penstock.core.errors import StartupFailed
from penstock.engine import loading
from penstock.engine.hugging_face import HuggingFaceModel
from penstock.engine.loading import load_model
from tests.engine.harness import generate
from tests.engine.tiny_models import VOCAB_SIZE, hugging_face_tokens, make_model, save_model, tokens

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + i for i in range(8)],
}


def load(folder: Path, **changes: Any) -> loading.LoadedModel:
    return load_model(EngineConfig(model=str(folder), **changes), lambda *_: None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.filterwarnings("ignore:the CPU kernels know:RuntimeWarning")
def test_what_it_says_of_itself(dtype: str, tmp_path: Path) -> None:
    folder = tmp_path / "my-llama"
    save_model(folder, "llama")
    model = load(folder, dtype=dtype)
    assert (model.name, model.dtype) == ("my-llama", dtype)
    assert (model.vocab_size, model.max_model_len) == (VOCAB_SIZE, 256)
    assert model.description.startswith(f"penstock decoder (llama), {dtype}, checked against")
    error = float(model.description.rsplit(": ", 1)[1])
    assert error < 1e-5
    layout = model.layout(32)
    assert (layout.dtype, layout.num_kv_heads, layout.head_dim) == (dtype, 2, 16)


@pytest.mark.parametrize("is_native", [True, False])
def test_auto_dtype_is_what_the_machine_multiplies(
    is_native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: is_native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    save_model(tmp_path, "llama")
    assert load(tmp_path).dtype == ("bfloat16" if is_native else "float32")


def test_every_end_token_is_known(tmp_path: Path) -> None:
    model = make_model("llama", eos_token_id=[7, 5])
    model.generation_config.eos_token_id = 9
    model.save_pretrained(tmp_path)
    assert load(tmp_path).eos_token_ids == (5, 7, 9)
    (tmp_path / "generation_config.json").unlink()
    assert load(tmp_path).eos_token_ids == (5, 7)


def test_progress_ends_at_one(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    heard: list[tuple[str, float]] = []
    load_model(EngineConfig(model=str(tmp_path)), lambda *report: heard.append(report))
    assert {"reading weights", "packing", "checking"} == {stage for stage, _ in heard}
    assert dict(heard) == dict.fromkeys(("reading weights", "packing", "checking"), 1.0)
    assert all(0.0 <= done <= 1.0 for _, done in heard)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "qwen3_moe", "gpt2"])
def test_dummy_weights_need_only_a_config(name: str, tmp_path: Path) -> None:
    make_model(name).config.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    first, again, other = (load(tmp_path, load_format="dummy", seed=seed) for seed in (3, 3, 4))
    prompts = [tokens(20), tokens(5)]
    wanted = generate(first, prompts, 8)
    assert generate(again, prompts, 8) == wanted
    assert generate(other, prompts, 8) != wanted
    assert first.identity == again.identity != other.identity


def test_a_missing_model_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StartupFailed, match="Give the path of a folder"):
        load(tmp_path / "nothing-here")
    with pytest.raises(StartupFailed, match=r"no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StartupFailed, match=r"config\.json cannot be used"):
        load(tmp_path)
    save_model(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(StartupFailed, match="cannot be loaded"):
        load(tmp_path)


def test_an_unknown_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupFailed, match="--device tpu: it is none of cpu, cuda"):
        load(tmp_path, device="tpu")


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartupFailed, match=r"is not complete: 9 weights.*layers\.4"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("t5", {}, "t5 models have an encoder"),
        ("deepseek_v3", {}, "deepseek_v3 models have layers.*latent attention"),
        ("mamba", {"hidden_size": 64, "num_hidden_layers": 2}, "mamba"),
        ("qwen3_next", {}, "qwen3_next models have layers.*linear_attention"),
        ("llama4_text", {}, "llama4_text models have layers.*chunked_attention"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised .gptq"),
        ("bert", {}, "bert"),
    ],
)
def test_unsupported_kinds_are_named(
    kind: str, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **values}))
    with pytest.raises(StartupFailed, match=message):
        load(tmp_path, load_format="dummy", max_model_len=64)


@pytest.mark.parametrize(
    ("max_model_len", "message"), [(257, "made for 256 positions"), (8, "at least")]
)
def test_impossible_context_lengths_are_refused(
    max_model_len: int, message: str, tmp_path: Path
) -> None:
    save_model(tmp_path, "llama")
    with pytest.raises(StartupFailed, match=message):
        load(tmp_path, max_model_len=max_model_len)


def test_only_declared_models_run_on_the_flat_decoder(tmp_path: Path) -> None:
    save_model(tmp_path, "gpt2")
    with pytest.raises(StartupFailed, match="not declared"):
        load(tmp_path, model_impl="penstock")


def test_longrope_takes_the_factors_of_the_length_served(tmp_path: Path) -> None:
    hf_model = save_model(
        tmp_path, "phi3", rope_parameters=LONGROPE, original_max_position_embeddings=64
    )
    # Beyond the original length, Hugging Face turns every position by the long factors.
    prompts = [tokens(70)]
    wanted = hugging_face_tokens(hf_model, prompts, 6)
    assert generate(load(tmp_path, dtype="float32"), prompts, 6, chunk=11) == wanted
    prompts = [tokens(40)]
    wanted = hugging_face_tokens(hf_model, prompts, 6)
    short = load(tmp_path, dtype="float32", max_model_len=64)
    assert generate(short, prompts, 6, chunk=11) == wanted

    with pytest.raises(StartupFailed, match="lower --max-model-len to 64"):
        load(tmp_path, model_impl="transformers")
    served = load(tmp_path, dtype="float32", model_impl="transformers", max_model_len=64)
    assert isinstance(served.forward, HuggingFaceModel)
    assert generate(served, prompts, 6, chunk=11) == wanted


def test_plain_weights_are_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters: list[weakref.ref[torch.Tensor]] = []
    original = loading.load_weights

    def load_and_watch(*arguments: Any) -> Any:
        model = original(*arguments)
        parameters.extend(weakref.ref(p) for p in model.parameters() if p.dim() == 2)
        return model

    monkeypatch.setattr(loading, "load_weights", load_and_watch)
    save_model(tmp_path, "llama", tie_word_embeddings=True)
    model = load(tmp_path, dtype="bfloat16")
    gc.collect()
    assert model.description.startswith("penstock")
    assert len(parameters) == 4 * 7 + 1
    assert not [reference for reference in parameters if reference() is not None]


def test_no_thread_is_left_behind_for_a_fork_to_lose(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    script = (
        "import os, sys\n"
        "from penstock.core.config import EngineConfig\n"
        "from penstock.engine.loading import load_model\n"
        "load_model(EngineConfig(model=sys.argv[1]), lambda *_: None)\n"
        "print(len(os.listdir('/proc/self/task')))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert result.stdout.split() == ["1"]
