"""Workers whose pools have different shapes, over real messages, threads and shared memory.

With the model whose KV is a hash chain, so that a token in a wrong slot is seen; and with the
built-in model, which gives the tokens that it gives on one worker alone.
"""

import asyncio
import random
from pathlib import Path

import pytest
import torch

from penstock.cli.cluster import BUILTIN_MODEL
from penstock.core.block import KVLayout
from penstock.core.config import EngineConfig
from penstock.core.node import DecisionLog
from penstock.core.request import Request, SamplingParams
from penstock.core.types import RequestId
from penstock.engine.executor import ModelExecutor
from penstock.engine.loading import load_model
from penstock.engine.model import LoadedModel
from penstock.sim.executor import Execute, MakeModel, chain_layout, expected_tokens
from penstock.transfer.region import Bytes2D
from tests.cluster.test_same_decisions import make_trace, run_for_real

SIZES = [(16, 32), (32, 16), (64, 16)]


def ends_of_moves(log: DecisionLog) -> list[dict[str, object]]:
    """Return what became of every move of a worker."""
    events = [entry.event for entry in log]
    return [e for e in events if isinstance(e, dict) and e["type"] == "MoveDone"]


@pytest.mark.parametrize("sizes", SIZES)
def test_every_token_is_right_between_block_sizes(sizes, tmp_path: Path) -> None:
    layouts = {name: chain_layout(size) for name, size in zip(("p0", "d0"), sizes, strict=True)}

    logs, tokens = asyncio.run(run_for_real(tmp_path, make_trace(), layouts))

    for request in make_trace():
        assert tokens[request.request_id] == expected_tokens(request, request.params.max_tokens, ())
    ends = ends_of_moves(logs["d0"])
    assert len(ends) >= len(make_trace()) - 1
    assert not [e for e in ends if e["error"] or e["is_corrupt"] or e["is_stale"]]


def engine_model(model: LoadedModel) -> MakeModel:
    """Return what runs steps by a loaded model, over pools of any block size."""

    def make(layout: KVLayout, pools: tuple[Bytes2D, ...]) -> Execute:
        inner = (2, layout.block_size, layout.num_kv_heads, layout.head_dim)
        dtype = getattr(torch, layout.dtype)
        tensors = (torch.from_numpy(pool).view(dtype) for pool in pools)
        groups = zip(tensors, layout.groups, strict=True)
        shaped = tuple(t.view(-1, len(group.layers), *inner) for t, group in groups)
        return torch.inference_mode()(ModelExecutor(model, shaped).execute)

    return make


def make_prompts() -> list[Request]:
    """Prompts of one to many blocks, greedy; the last begins with the one before."""
    rng = random.Random(7)
    prompts = [tuple(rng.randrange(10, 4096) for _ in range(n)) for n in (5, 33, 100, 150)]
    prompts.append(prompts[-1] + prompts[0])
    params = SamplingParams(max_tokens=12, temperature=0.0, seed=1, ignore_eos=True)
    return [
        Request(request_id=RequestId(f"r{i}"), prompt_token_ids=prompt, params=params)
        for i, prompt in enumerate(prompts)
    ]


@pytest.mark.slow
def test_the_built_in_model_says_the_same_between_block_sizes(tmp_path: Path) -> None:
    model = load_model(EngineConfig(model=str(BUILTIN_MODEL), dtype="float32"), lambda *_: None)
    said = []
    for number, sizes in enumerate([(32, 32), *SIZES]):
        folder = tmp_path / str(number)
        folder.mkdir()
        layouts = {name: model.layout(size) for name, size in zip(("p0", "d0"), sizes, strict=True)}
        made = run_for_real(folder, make_prompts(), layouts, engine_model(model))
        logs, tokens = asyncio.run(made)
        ends = ends_of_moves(logs["d0"])
        assert len(ends) >= len(make_prompts())
        assert not [e for e in ends if e["error"] or e["is_corrupt"] or e["is_stale"]]
        said.append(tokens)
    assert len(said[0]) == len(make_prompts())
    assert all(tokens == said[0] for tokens in said)
