"""The executor of devices: tokens are those of the CPU's, and what has not changed is not sent."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from penstock.core.request import SamplingParams
from penstock.core.step import SampleRow, Step
from penstock.engine import graphs
from penstock.engine.architectures import ARCHITECTURES
from penstock.engine.device import find_device
from penstock.engine.device_executor import DeviceExecutor
from penstock.engine.executor import ModelExecutor
from penstock.engine.graphs import Capture, CudaGraphs, EagerReplay, choose_capture
from penstock.engine.kernels.select import select_kernels
from penstock.engine.lift import lift
from penstock.engine.model import LoadedModel
from tests.engine.harness import GREEDY, Harness
from tests.engine.tiny_models import VOCAB_SIZE, hugging_face_tokens, make_model, tokens

# Kernels are slow in the interpreter: as few layers as show both groups of KV, and short prompts.
SMALL = {
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
DRAWN = SamplingParams(temperature=0.9, top_p=0.9, top_k=50, seed=7)
HOT = SamplingParams(temperature=0.9, seed=3)
HOST = SamplingParams(temperature=0.8, frequency_penalty=0.5, logprobs=2, seed=9)
PROMPTS = [tokens(17), tokens(4), tokens(9)]


def load(name: str, device_name: str, sizes: dict[str, object] = SMALL) -> LoadedModel:
    device = find_device(device_name)
    model = make_model(name, **sizes).to(device.torch_device)
    return LoadedModel(
        name=name,
        identity=name,
        dtype="float32",
        vocab_size=VOCAB_SIZE,
        max_model_len=256,
        eos_token_ids=(1,),
        description="a test's",
        forward=lift(model, ARCHITECTURES[name], 256),
        kernels=select_kernels(device, torch.float32),
        device=device,
    )


@pytest.fixture(scope="module", params=["ministral"])
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def there(name) -> LoadedModel:
    return load(name, "cuda" if torch.cuda.is_available() else "interpreter")


@pytest.fixture(scope="module")
def here(name) -> LoadedModel:
    return load(name, "cpu")


def on_device(
    model: LoadedModel,
    *,
    block_size: int = 16,
    max_num_seqs: int = 4,
    capture: Capture | None = None,
) -> Harness:
    capture = capture or choose_capture(model)
    make = partial(DeviceExecutor, capture=capture, max_num_seqs=max_num_seqs, max_model_len=256)
    harness = Harness(model, block_size, make_executor=make)
    harness.executor.warm_up()
    return harness


def outputs_of(harness: Harness, count: int) -> list[list[int]]:
    return [harness.outputs(index) for index in range(count)]


def test_greedy_tokens_are_hugging_face_s(name, there):
    wanted = hugging_face_tokens(make_model(name, **SMALL), PROMPTS, 5)
    harness = on_device(there)
    for prompt in PROMPTS:
        harness.add(prompt)
    harness.run(5, chunk=8)
    assert outputs_of(harness, 3) == wanted


def test_sampled_tokens_are_those_of_the_cpu(here, there):
    """Drawn on the device, on the host, and beside each other in one batch."""
    harnesses = Harness(here), on_device(there)
    for harness in harnesses:
        for prompt, params in zip(PROMPTS, (DRAWN, HOST, GREEDY), strict=True):
            harness.add(prompt, params)
        harness.run(5)
    assert outputs_of(harnesses[1], 3) == outputs_of(harnesses[0], 3)
    for ours, law in zip(harnesses[1].sampled[1], harnesses[0].sampled[1], strict=True):
        assert ours.logprobs.logprob == pytest.approx(law.logprobs.logprob, abs=1e-4)
        assert [token for token, _ in ours.logprobs.top] == [t for t, _ in law.logprobs.top]


def test_a_steady_step_sends_nothing(there):
    harness = on_device(there)
    executor = harness.executor
    harness.add(PROMPTS[0])
    harness.add(PROMPTS[1], DRAWN)
    harness.step({0: 17, 1: 4})
    assert executor.num_rows_sent == 0
    harness.step({0: 1, 1: 1})
    assert executor.num_rows_sent == 2
    for _ in range(3):
        harness.step({0: 1, 1: 1})
    assert executor.num_rows_sent == 2


def test_rows_are_sent_when_they_change_and_those_alone(here, there):
    """A block more, another place in the batch, an end, a newcomer: and tokens stay right."""
    harnesses = Harness(here), on_device(there)
    sent = []
    for harness in harnesses:
        harness.add(tokens(15), DRAWN)
        harness.add(tokens(5), DRAWN)
        harness.add(tokens(6))
        harness.step({0: 15, 1: 5, 2: 6})
        for new in (
            {0: 1, 1: 1},  # both are new to the device
            {0: 1, 1: 1},  # the first needs another block
            {0: 1, 1: 1},
            {1: 1},  # the second comes first, and what was second is padding
            {1: 1, 2: 1},
        ):
            harness.step(new)
            sent.append(getattr(harness.executor, "num_rows_sent", None))
    assert outputs_of(harnesses[1], 3) == outputs_of(harnesses[0], 3)
    assert np.diff([0, *sent[5:]]).tolist() == [2, 1, 0, 1, 1]


def test_rounds_run_ahead_and_stop(here, there):
    harnesses = Harness(here), on_device(there)
    for harness in harnesses:
        harness.add(PROMPTS[0], DRAWN)
        harness.add(PROMPTS[1])
        harness.step({0: 17, 1: 4})
    for _ in range(6):
        harnesses[0].step({0: 1, 1: 1})
    # Told to stop after the third; the fourth is under way by then.
    harnesses[1].rounds([0, 1], repeats=8, wanted=3)
    assert outputs_of(harnesses[1], 2) == [row[:5] for row in outputs_of(harnesses[0], 2)]
    harnesses[1].rounds([0, 1], repeats=2, wanted=8)
    assert outputs_of(harnesses[1], 2) == outputs_of(harnesses[0], 2)
    # Two rows at first, and then at most what the window has let go: no round sent anything.
    assert harnesses[1].executor.num_rows_sent <= 4


class NoWaiting(TorchDispatchMode):
    """Refuses what a graph cannot hold: operations that ask the device for a number."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        assert name not in self.REFUSED, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


class Watched:
    """Captures by watching: what is run must be fit for a graph."""

    def __init__(self) -> None:
        self.runs = 0

    def capture(self, run):
        def watched() -> None:
            self.runs += 1
            with NoWaiting():
                run()

        return watched


@pytest.mark.parametrize("kind", ["ministral", "qwen3_moe"])
def test_nothing_that_is_captured_waits_for_the_device(kind):
    model = load(kind, "cuda" if torch.cuda.is_available() else "interpreter")
    watched = Watched()
    harness = on_device(model, capture=watched)
    harness.add(PROMPTS[1], DRAWN)
    harness.step({0: 4})
    harness.step({0: 1})
    assert watched.runs == 1
    with pytest.raises(AssertionError, match="_local_scalar_dense waits for the device"):
        watched.capture(lambda: torch.ones(1).item())()


@pytest.mark.gpu
def test_a_graph_computes_what_is_launched(there):
    """The same kernels over the same memory: bit for bit."""
    found = []
    for capture in (CudaGraphs(there.device.torch_device), EagerReplay()):
        harness = on_device(there, capture=capture)
        harness.add(PROMPTS[0], DRAWN)
        harness.add(PROMPTS[1])
        harness.step({0: 17, 1: 4})
        logits = []
        for _ in range(20):
            harness.step({0: 1, 1: 1})
            logits.append(harness.executor.logits(2).clone())
        found.append((outputs_of(harness, 2), torch.stack(logits)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


LOST = 0, 2, 3, 3, 0
"""Blocks that a row lacks behind its first one, step by step."""


def behind_gaps(model: LoadedModel, lost: Sequence[int]) -> list[int]:
    """Decode two sequences, the first of which lacks blocks now and then; return the tokens."""
    size = 16, 1, 2, 4, model.forward.attention[0].num_kv_heads, 16
    pool = torch.full(size, float("nan"), device=model.device.torch_device)
    executor: DeviceExecutor | ModelExecutor = ModelExecutor(model, (pool,))
    if model.device.has_triton:
        capture = choose_capture(model)
        executor = DeviceExecutor(model, (pool,), capture, max_num_seqs=2, max_model_len=32)
    rows, tables = [tokens(22), tokens(6)], np.arange(16, dtype=np.int32)[::-1].reshape(2, 8)
    executor.execute(
        Step(
            step_id=0,
            token_ids=np.array(rows[0][:-1] + rows[1][:-1], np.int64),
            num_new=np.array([21, 5], np.int32),
            num_computed=np.zeros(2, np.int32),
            block_tables=(tables,),
            samples=(),
        )
    )
    for count in lost:
        table = tables.copy()
        table[0, 1 : 1 + count] = 0
        step = Step(
            step_id=0,
            token_ids=np.array([row[-1] for row in rows], np.int64),
            num_new=np.ones(2, np.int32),
            num_computed=np.array([len(row) - 1 for row in rows], np.int32),
            block_tables=(table,),
            samples=tuple(SampleRow(i, HOT, len(row), len(row), row) for i, row in enumerate(rows)),
            gaps=np.array([[0, 1, count]], np.int32) if count else None,
        )
        for row, sampled in zip(rows, executor.execute(step), strict=True):
            row.append(sampled.token_id)
    return rows[0][22:] + rows[1][6:]


def test_a_window_of_the_kv_gives_the_tokens_of_the_cpu():
    """Rows stay on the device while nothing is missing; behind a gap they are computed as any."""
    device = "cuda" if torch.cuda.is_available() else "interpreter"
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    here, there = (load("qwen3", name, sizes) for name in ("cpu", device))
    wanted = behind_gaps(here, LOST)
    assert behind_gaps(there, LOST) == wanted != behind_gaps(here, [0] * len(LOST))


def test_what_the_host_samples_is_run_once(there):
    harness = on_device(there)
    harness.add(PROMPTS[1], HOST)
    harness.step({0: 4})
    harness.rounds([0], repeats=8, wanted=8)
    assert len(harness.outputs(0)) == 2


def test_prompts_warm_up_what_they_will_need_and_nothing_else(here, there):
    harness = on_device(there)
    harness.executor.warm_up([5])
    assert harness.executor.num_rows_sent == 0
    wanted = Harness(here)
    for each in (wanted, harness):
        each.add(PROMPTS[1], DRAWN)
        each.run(2)
    assert harness.outputs(0) == wanted.outputs(0)


def test_more_rows_than_any_graph_has_are_a_batch(there, monkeypatch):
    monkeypatch.setattr(graphs, "ROWS_MAX", 1)
    harness = on_device(there, max_num_seqs=2)
    harness.add(PROMPTS[1])
    harness.add(PROMPTS[1])
    harness.step({0: 4, 1: 4})
    harness.step({0: 1, 1: 1})
    assert harness.executor.num_rows_sent == 0
    assert harness.outputs(0) == harness.outputs(1)
