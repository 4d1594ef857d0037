"""Whole models through the Triton kernels: logits and tokens in float32 are the reference's."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from penstock.core.step import Step
from penstock.engine.architectures import ARCHITECTURES
from penstock.engine.batch import make_batch
from penstock.engine.kernels.cuda import CudaKernels
from penstock.engine.kernels.reference import ReferenceKernels
from penstock.engine.lift import lift
from penstock.engine.model import layout_of
from tests.engine.tiny_models import make_model, tokens

BLOCK_SIZE = 16
# As few as show both groups of KV: a kernel is slow in the interpreter.
LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = ("llama", "qwen3", "gemma3_text", "gpt_oss")


def make_step(num_computed: list[int], num_new: list[int], blocks: np.ndarray, groups: int) -> Step:
    return Step(
        step_id=0,
        token_ids=np.array(tokens(sum(num_new), seed=sum(num_computed)), np.int64),
        num_new=np.array(num_new, np.int32),
        num_computed=np.array(num_computed, np.int32),
        block_tables=(blocks,) * groups,
        samples=(),
    )


def logits_of(decoder, kernels, device, block_size=BLOCK_SIZE) -> list[torch.Tensor]:
    """Prefill in chunks, decode, and do both in one batch; return the logits of every row."""
    layout = layout_of(decoder, "m", "float32", block_size)
    pools = [
        torch.full((16, len(g.layers), 2, block_size, 2, 16), torch.nan, device=device)
        for g in layout.groups
    ]
    run = decoder.bind(kernels, pools)
    blocks = np.random.default_rng(0).permutation(15).astype(np.int32).reshape(3, 5) + 1
    found = []
    done = np.zeros(3, np.int64)
    for rows, new in (((0, 1), (18, 3)), ((1, 0), (1, 1)), ((0, 1, 2), (1, 1, 4))):
        rows = list(rows)
        step = make_step(done[rows].tolist(), list(new), blocks[rows], len(layout.groups))
        batch = make_batch(step, block_size)
        batch = replace(batch, logits_rows=torch.arange(sum(new))).to(device)
        found.append(run(batch).cpu())
        done[rows] += new
    return found


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_reference(name, device):
    model = make_model(name, **LAYERS)
    decoder = lift(model, ARCHITECTURES[name.split("-")[0]], 256)
    expected = logits_of(decoder, ReferenceKernels(), torch.device("cpu"))
    if device.type != "cpu":
        there = make_model(name, **LAYERS).to(device)
        decoder = lift(there, ARCHITECTURES[name.split("-")[0]], 256)
    found = logits_of(decoder, CudaKernels(num_multiprocessors=8), device)
    for ours, reference in zip(found, expected, strict=True):
        spread = (reference - reference.mean(-1, keepdim=True)).norm(dim=-1).max()
        assert ((ours - reference).norm(dim=-1) / spread).max() < 1e-5


def test_decoding_rows_come_in_a_launch_of_their_own(monkeypatch):
    """They are quicker by themselves, beside a chunk as well."""
    from penstock.engine.kernels import cuda

    seen = []
    launch = cuda.paged_attention

    def note(spec, query, cache, sequences, output, **options):
        seen.append((sequences.max_query_len, sequences.num_rows, len(sequences.kv_len)))
        launch(spec, query, cache, sequences, output, **options)

    monkeypatch.setattr(cuda, "paged_attention", note)
    decoder = lift(make_model("llama", num_hidden_layers=1), ARCHITECTURES["llama"], 256)
    logits_of(decoder, CudaKernels(num_multiprocessors=8), torch.device("cpu"))
    assert seen == [(18, 21, 2), (1, 2, 2), (1, 2, 2), (4, 4, 1)]
