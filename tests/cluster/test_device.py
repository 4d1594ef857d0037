"""A cluster whose workers run the CUDA kernels, in Triton's interpreter: its tokens are right.

What is shown is the way of a worker on a device: planned before the fork, loaded and checked after
it, decoding over rows that stay, and handing off.
"""

import shutil
from pathlib import Path

import pytest
import torch

from penstock import LLM, SamplingParams
from penstock.cli.cluster import BUILTIN_MODEL
from tests.engine.tiny_models import save_model

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22]]
PARAMS = [
    SamplingParams(max_tokens=4, temperature=temperature, seed=3, ignore_eos=True)
    for temperature in (0.8, 0.0)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(
        folder,
        "ministral",
        vocab_size=4096,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    for path in BUILTIN_MODEL.glob("token*"):
        shutil.copy(path, folder)
    return folder


def generate(folder: Path, device: str) -> list[tuple[int, ...]]:
    with LLM(str(folder), device=device, dtype="float32") as llm:
        return [output.token_ids for output in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on a GPU then")
def test_prefill_and_decode_workers_on_a_device(folder):
    assert generate(folder, "interpreter") == generate(folder, "cpu")


@pytest.mark.gpu
@pytest.mark.slow
def test_prefill_and_decode_workers_on_a_gpu(folder):
    assert generate(folder, "cuda") == generate(folder, "cpu")
