"""Every declared architecture through separate prefill and decode workers, token by token.

The cluster is simulated, its model is not: cores, hand-offs and copies work on real KV in
float32, and the tokens must be those of `generate`. Prompts come alone and together, whole and in
chunks, with prefixes that are cached on one side, on both or nowhere.
"""

import random
from pathlib import Path

import pytest
import torch

from penstock.core.block import KVLayout
from penstock.core.config import EngineConfig
from penstock.core.request import Request, SamplingParams
from penstock.core.step import Sampled, Step
from penstock.core.types import NS_PER_S, RequestId, Role
from penstock.engine.executor import ModelExecutor
from penstock.engine.loading import load_model
from penstock.engine.model import LoadedModel
from penstock.sim.executor import Execute
from penstock.sim.run import ClusterSpec, SimCluster
from penstock.transfer.region import Bytes2D
from tests.engine.tiny_models import DECLARED, VOCAB_SIZE, hugging_face_tokens, save_model

MAX_TOKENS = 8
PAIR = {"p0": Role.PREFILL, "d0": Role.DECODE}
TWO_PAIRS = {"p0": Role.PREFILL, "p1": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE}
ALONE = {"m0": Role.MIXED}


def load(folder: Path) -> LoadedModel:
    """Load a tiny model in float32, by its row in the table and not otherwise."""
    config = EngineConfig(model=str(folder), dtype="float32", block_size=16, model_impl="penstock")
    return load_model(config, lambda *_: None)


def run_cluster(
    model: LoadedModel,
    requests: list[Request],
    roles: dict[str, Role],
    *,
    max_num_batched_tokens: int = 24,
) -> list[list[int]]:
    """Serve requests, the first half one after the other and the rest at once."""
    layout = model.layout(16)

    def make_model(layout: KVLayout, pools: tuple[Bytes2D, ...]) -> Execute:
        dtype = getattr(torch, layout.dtype)
        inner = (2, layout.block_size, layout.num_kv_heads, layout.head_dim)
        tensors = tuple(
            torch.from_numpy(pool).view(dtype).view(-1, len(group.layers), *inner)
            for pool, group in zip(pools, layout.groups, strict=True)
        )
        executor = ModelExecutor(model, tensors)

        def execute(step: Step) -> tuple[Sampled, ...]:
            with torch.inference_mode():
                return executor.execute(step)

        return execute

    spec = ClusterSpec(
        roles=roles,
        layout=layout,
        num_blocks=(32,) * len(layout.groups),
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=200,
        model=make_model,
    )
    cluster = SimCluster(spec)
    half = len(requests) // 2
    for number, request in enumerate(requests):
        cluster.submit(request, min(number, half) * NS_PER_S)
    cluster.run()
    for worker in cluster.workers.values():
        assert worker.core.is_idle
        assert worker.core.load().pulls_recomputed == 0
    assert all(outcome.error is None for outcome in cluster.outcomes.values())
    return [cluster.outcomes[request.request_id].token_ids for request in requests]


def make_requests(**params: float) -> list[Request]:
    """Six prompts of 3 to 75 tokens; two begin like others, one is another one again."""
    rng = random.Random(7)
    stem = tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(40))
    own = [tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(n)) for n in (3, 35, 33, 1, 17)]
    prompts = [own[0], stem + own[1], stem + own[2], stem + own[1], own[4], own[4] + own[3]]
    settings = {"temperature": 0.0, **params}
    return [
        Request(
            request_id=RequestId(f"r{number}"),
            prompt_token_ids=prompt,
            params=SamplingParams(
                max_tokens=MAX_TOKENS, seed=100 + number, ignore_eos=True, **settings
            ),
        )
        for number, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("name", DECLARED)
def test_prefill_and_decode_on_separate_workers_give_hugging_face_s_tokens(
    name: str, tmp_path: Path
) -> None:
    hf = save_model(tmp_path, name)
    requests = make_requests()
    prompts = [request.prompt_token_ids for request in requests]
    expected = hugging_face_tokens(hf, prompts, MAX_TOKENS)
    assert run_cluster(load(tmp_path), requests, PAIR) == expected


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe"])
def test_who_computes_makes_no_difference(name: str, tmp_path: Path) -> None:
    save_model(tmp_path, name)
    model = load(tmp_path)
    for params in ({}, {"temperature": 0.9, "top_p": 0.9, "presence_penalty": 0.5}):
        requests = make_requests(**params)
        alone = run_cluster(model, requests, ALONE, max_num_batched_tokens=200)
        for roles in (PAIR, TWO_PAIRS):
            assert run_cluster(model, requests, roles) == alone
