"""What is foreseen of a model is what it is once loaded."""

import pytest
import torch

from penstock.core.config import EngineConfig
from penstock.core.types import GIB
from penstock.engine.device import Device
from penstock.engine.loading import load_model
from penstock.engine.plan import plan_model
from tests.engine.tiny_models import save_model


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_moe", "llama-tied-biased", "gpt_neox"])
def test_a_plan_is_what_is_loaded(name, tmp_path):
    model = save_model(tmp_path, name)
    config = EngineConfig(model=str(tmp_path), dtype="float32", block_size=16)
    loaded = load_model(config, lambda *_: None)
    plan = plan_model(config, Device("cuda"))
    assert plan.layout == loaded.layout(16)
    assert plan.max_model_len == loaded.max_model_len
    assert plan.eos_token_ids == loaded.eos_token_ids
    assert plan.vocab_size == loaded.vocab_size
    assert plan.weight_bytes == 4 * model.num_parameters()


def test_on_cuda_a_model_is_bfloat16_unless_asked_otherwise(tmp_path):
    save_model(tmp_path, "llama")
    plan = plan_model(EngineConfig(model=str(tmp_path)), Device("cuda"))
    assert plan.layout.dtype == "bfloat16"
    assert not torch.cuda.is_initialized()


def test_working_memory_grows_with_rows_and_tokens(tmp_path):
    save_model(tmp_path, "llama")
    plan = plan_model(EngineConfig(model=str(tmp_path)), Device("cuda"))
    least = plan.working_bytes(max_num_seqs=1, max_num_batched_tokens=1)
    assert GIB < least < 2 * GIB
    assert plan.working_bytes(max_num_seqs=64, max_num_batched_tokens=1) > least
    assert plan.working_bytes(max_num_seqs=1, max_num_batched_tokens=8192) > least
