"""What the end of a prompt looks at, against Hugging Face's attention; and that looking changes
nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch

from penstock.core.config import EngineConfig
from penstock.core.step import Observation, Step
from penstock.engine.batch import make_batch
from penstock.engine.loading import load_model
from penstock.engine.observe import Observer
from penstock.kv.selection import OBSERVED_TOKENS, snap_scores

FOLDER = Path(__file__).parents[2] / "penstock" / "builtin" / "penstock-tiny"
BLOCK_SIZE = 16
NUM_TOKENS = 101
TOKENS = np.random.default_rng(5).integers(10, 4000, NUM_TOKENS)


def step_of(num_blocks: int, *, observes: bool) -> Step:
    first = NUM_TOKENS - OBSERVED_TOKENS
    seen = Observation(0, first, tuple(TOKENS[first:].tolist()))
    return Step(
        step_id=1,
        token_ids=TOKENS.astype(np.int64),
        num_new=np.array([NUM_TOKENS], np.int32),
        num_computed=np.array([0], np.int32),
        block_tables=(np.arange(num_blocks, dtype=np.int32)[None, ::-1].copy(),),
        samples=(),
        observations=(seen,) if observes else (),
    )


@pytest.mark.parametrize("implementation", ["penstock", "transformers"])
def test_scores_are_the_pooled_attention_of_the_last_tokens_by_block(implementation: str):
    from transformers import AutoModelForCausalLM

    config = EngineConfig(model=str(FOLDER), dtype="float32", model_impl=implementation)
    model = load_model(config, lambda *_: None)
    layout = model.layout(BLOCK_SIZE)
    num_blocks = layout.num_blocks(NUM_TOKENS)
    inner = (2, BLOCK_SIZE, layout.num_kv_heads, layout.head_dim)
    pool = torch.zeros(num_blocks, len(layout.groups[0].layers), *inner)
    run = model.forward.bind(model.kernels, (pool,))
    step = step_of(num_blocks, observes=True)
    with torch.inference_mode():
        run(make_batch(step, BLOCK_SIZE))
    before = pool.clone()
    (scores,) = Observer(model, (pool,)).observe(step)
    assert torch.equal(pool, before)

    theirs = AutoModelForCausalLM.from_pretrained(
        FOLDER, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        attentions = theirs(torch.tensor(TOKENS)[None], output_attentions=True).attentions
    votes = np.zeros(NUM_TOKENS - OBSERVED_TOKENS)
    for weights in attentions:
        last = weights[0, :, -OBSERVED_TOKENS:].numpy()
        votes += snap_scores(last, layout.num_kv_heads).sum(0)
    wanted = [votes[i : i + BLOCK_SIZE].sum() for i in range(0, len(votes), BLOCK_SIZE)]
    np.testing.assert_allclose(scores, wanted, rtol=1e-3)
    assert Observer(model, (pool,)).observe(step_of(num_blocks, observes=False)) == ()
