"""Requests through the executor: neither batch, chunks, blocks nor worker make a difference."""

import pytest

from penstock.core.config import EngineConfig
from penstock.core.request import SamplingParams
from penstock.engine.loading import load_model
from penstock.engine.model import LoadedModel
from tests.engine.harness import GREEDY, Harness, generate
from tests.engine.tiny_models import save_model, tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, "gemma3_text")
    return load_model(EngineConfig(model=str(folder), dtype="float32"), lambda *_: None)


RANDOM = SamplingParams(
    temperature=0.8, top_p=0.9, frequency_penalty=0.3, repetition_penalty=1.2, seed=5, logprobs=2
)


def test_sampled_tokens_do_not_depend_on_batch_chunks_or_blocks(model: LoadedModel) -> None:
    prompts = [tokens(40), tokens(9), tokens(21)]
    alone = [generate(model, [prompt], 12, params=RANDOM)[0] for prompt in prompts]
    assert generate(model, prompts, 12, params=RANDOM, chunk=7) == alone
    assert generate(model, prompts, 12, params=RANDOM, block_size=32) == alone
    assert len({tuple(output) for output in alone}) == 3


def test_another_worker_continues_the_same_sequence(model: LoadedModel) -> None:
    prompt = tokens(30)
    whole = generate(model, [prompt], 12, params=RANDOM)[0]
    # The second worker gets prompt and output so far; its harness calls only the prompt a prompt.
    second = Harness(model, seed=3)
    index = second.add(prompt, RANDOM, output=whole[:5])
    second.run(12, chunk=16)
    assert second.outputs(index) == whole


def test_a_chunk_that_ends_no_prompt_samples_nothing(model: LoadedModel) -> None:
    harness = Harness(model)
    index = harness.add(tokens(20), GREEDY)
    harness.step({index: 12})
    assert harness.outputs(index) == []
    harness.step({index: 8})
    assert len(harness.outputs(index)) == 1


def test_requests_join_and_leave_a_running_batch(model: LoadedModel) -> None:
    prompts = [tokens(25), tokens(11)]
    alone = [generate(model, [prompt], 8)[0] for prompt in prompts]
    harness = Harness(model)
    first = harness.add(prompts[0])
    harness.step({first: 25})
    harness.step({first: 1})
    second = harness.add(prompts[1])
    harness.step({second: 4, first: 1})
    harness.step({first: 1, second: 7})
    for _ in range(4):
        harness.step({second: 1, first: 1})
    for _ in range(3):
        harness.step({second: 1})
    assert harness.outputs(first) == alone[0]
    assert harness.outputs(second) == alone[1]


def test_logprobs_come_with_the_tokens(model: LoadedModel) -> None:
    harness = Harness(model)
    plain = harness.add(tokens(10), GREEDY)
    verbose = harness.add(tokens(12), RANDOM)
    harness.run(3)
    assert all(result.logprobs is None for result in harness.sampled[plain])
    for result in harness.sampled[verbose]:
        assert len(result.logprobs.top) == 2
        assert result.logprobs.logprob <= result.logprobs.top[0][1] <= 0.0
