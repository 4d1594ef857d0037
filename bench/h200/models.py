"""Whole models in the shapes of real ones, with random weights: are graphs, operations one by one
and Hugging Face of one mind, then decode steps and prefills beside their floors.

A floor is what reading the weights and the keys and values once takes at the rate of a plain copy,
or what the products take at that of a large one. Decode is timed over many rounds in a row, tokens
read on the host one round behind, as a worker runs them.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from h200.lab import Lab, Measure, Target, Wrong
from penstock.core.config import EngineConfig
from penstock.core.request import SamplingParams
from penstock.core.step import SampleRow, Step
from penstock.engine.device_executor import DeviceExecutor
from penstock.engine.graphs import EagerReplay, choose_capture
from penstock.engine.loading import load_model
from penstock.engine.model import LoadedModel
from penstock.engine.weights import load_weights, read_config

BLOCK_SIZE = 32
CONTEXT, ROUNDS = 1024, 32
BATCHES = 1, 8, 32, 128, 256
PREFILLS = 512, 2048, 8192, 32768
LONG = 8192
"""Above so many tokens a prefill is timed less often."""
GREEDY = SamplingParams(temperature=0.0, seed=0)
COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "dtype": "bfloat16",
    "eos_token_id": 1,
    "bos_token_id": 0,
}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}


@dataclass(frozen=True)
class Shape:
    """A model by its sizes."""

    kind: dict[str, object]
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    is_tied: bool = False
    head_dim: int = 128

    @property
    def config(self) -> dict[str, object]:
        """The model's config.json."""
        return {
            **COMMON,
            **ROPE,
            **self.kind,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.is_tied,
        }

    @property
    def small(self) -> Shape:
        """A model that a walk through can afford, with the same heads, norms and rotation."""
        sizes = {"hidden": 32, "inner": 48, "layers": 1, "vocab": 96}
        return replace(self, **sizes, heads=self.heads // self.kv_heads, kv_heads=1)

    @property
    def block_weights(self) -> int:
        """Weights that every token is multiplied with, but for the last product's."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def head_weights(self) -> int:
        """Weights of the product that makes logits."""
        return self.hidden * self.vocab

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values in bfloat16."""
        return 4 * self.layers * self.kv_heads * self.head_dim

    def decode_bytes(self, batch: int, context: int) -> int:
        """Bytes that a decode step cannot but read."""
        weights = 2 * (self.block_weights + self.head_weights)
        return weights + batch * context * self.token_bytes

    def prefill_flops(self, tokens: int) -> int:
        """Operations of a prefill without logits, attention as far as it is causal."""
        attention = 2 * tokens * (tokens + 1) * self.heads * self.head_dim * self.layers
        return 2 * self.block_weights * tokens + attention


SHAPES = {
    "qwen3_0_6b": Shape(QWEN3, 1024, 3072, 28, 16, 8, 151936, is_tied=True),
    "qwen3_8b": Shape(QWEN3, 4096, 12288, 36, 32, 8, 151936),
    "llama_8b": Shape(LLAMA, 4096, 14336, 32, 32, 8, 128256),
}
STEP_TARGET, SMALL_STEP_MS, PREFILL_TARGET = 1.35, 1.0, 0.75


def pick_shape(lab: Lab, name: str) -> Shape:
    """Return a shape as it is, or small where only the way is walked."""
    return lab.pick(SHAPES[name], SHAPES[name].small)


@contextmanager
def loaded(lab: Lab, shape: Shape, dtype: str) -> Iterator[tuple[LoadedModel, EngineConfig]]:
    """Yield a model with random weights on the lab's device; its memory is given back behind."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape.config))
        device = "cuda" if lab.is_cuda else "interpreter"
        config = EngineConfig(model=folder, load_format="dummy", dtype=dtype, device=device)
        yield load_model(config, lambda *_: None), config
    gc.collect()


class Bench:
    """A model's executor over pools of random keys and values, driven as a worker core does."""

    def __init__(
        self, model: LoadedModel, shape: Shape, num_tokens: int, max_num_seqs: int
    ) -> None:
        layout = model.layout(BLOCK_SIZE)
        self.num_blocks = -(-num_tokens // BLOCK_SIZE) + 1
        size = self.num_blocks, shape.layers, 2, BLOCK_SIZE, shape.kv_heads, shape.head_dim
        dtype = getattr(torch, layout.dtype)
        self.pool = torch.empty(size, dtype=dtype, device=model.device.torch_device).normal_()
        self.vocab = shape.vocab
        self._model, self._limits = model, (max_num_seqs, num_tokens)
        self.executor = self.make_executor(is_eager=False)

    def make_executor(self, *, is_eager: bool) -> DeviceExecutor:
        """Return what runs steps over the pool: graphs, or operations one by one."""
        max_num_seqs, max_model_len = self._limits
        executor = DeviceExecutor(
            self._model,
            (self.pool,),
            EagerReplay() if is_eager else choose_capture(self._model),
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
        )
        executor.warm_up()
        executor.prepare()
        return executor

    def tables(self, batch: int, num_tokens: int) -> np.ndarray:
        """Return blocks at random places, none twice."""
        width = -(-num_tokens // BLOCK_SIZE)
        order = np.random.default_rng(0).permutation(self.num_blocks)[: batch * width]
        return order.reshape(batch, width).astype(np.int32)

    def decode_step(self, batch: int, context: int, repeats: int) -> Step:
        """Return a step of sequences that have so much behind them, and may go on in rounds."""
        tables = self.tables(batch, context + repeats)
        rng = np.random.default_rng(1)
        samples = tuple(SampleRow(row, GREEDY, context - 1, context, []) for row in range(batch))
        return Step(
            step_id=0,
            token_ids=rng.integers(2, self.vocab, batch),
            num_new=np.ones(batch, np.int32),
            num_computed=np.full(batch, context - 1, np.int32),
            block_tables=(tables,),
            samples=samples,
            repeats=repeats,
        )

    def prefill_step(self, token_ids: np.ndarray, *, is_sampled: bool = False) -> Step:
        """Return a step that computes a prompt; a prefill worker samples nothing."""
        count = len(token_ids)
        samples = (SampleRow(0, GREEDY, count, count, []),) if is_sampled else ()
        return Step(
            step_id=0,
            token_ids=token_ids.astype(np.int64),
            num_new=np.array([count], np.int32),
            num_computed=np.zeros(1, np.int32),
            block_tables=(self.tables(1, count),),
            samples=samples,
        )

    def generate(self, executor: DeviceExecutor, prompt: list[int], count: int) -> list[int]:
        """Return greedy tokens: a prefill that samples, then steps of one token."""
        table = self.tables(1, len(prompt) + count)
        tokens = list(prompt)
        for start in (0, *range(len(prompt), len(prompt) + count - 1)):
            new = np.array(tokens[start:], np.int64)
            step = Step(
                step_id=0,
                token_ids=new,
                num_new=np.array([len(new)], np.int32),
                num_computed=np.array([start], np.int32),
                block_tables=(table,),
                samples=(SampleRow(0, GREEDY, len(prompt), len(tokens), tokens),),
            )
            tokens.append(executor.execute(step)[0].token_id)
        return tokens[len(prompt) :]


def check(lab: Lab) -> None:
    """Compare the tokens of graphs, of operations one by one and of Hugging Face, in float32."""
    shape = pick_shape(lab, "qwen3_0_6b")
    count, length = lab.pick((24, 100), (4, 9))
    prompt = np.random.default_rng(2).integers(2, shape.vocab, length).tolist()
    with loaded(lab, shape, "float32") as (model, config):
        bench = Bench(model, shape, length + count, 1)
        graph = bench.generate(bench.executor, prompt, count)
        eager = bench.generate(bench.make_executor(is_eager=True), prompt, count)
        hf_config = read_config(Path(config.model), config)
        device = model.device.torch_device
        peer = load_weights(config, hf_config, torch.float32, device)
        tokens = torch.tensor([prompt], device=device)
        with torch.inference_mode():
            for _ in range(count):
                logits = peer(tokens).logits[:, -1]
                tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
        theirs = tokens[0, length:].tolist()
    if not graph == eager == theirs:
        raise Wrong(f"tokens by graph {graph}, eager {eager}, Hugging Face {theirs}")


def decode(lab: Lab, name: str, shape: Shape, bench: Bench) -> None:
    """Time rounds of decoding."""
    context, rounds = lab.pick((CONTEXT, ROUNDS), (20, 2))
    for batch in lab.pick(BATCHES, (2,)):
        floor_ms = 0.0
        if lab.copy_bytes_per_s:
            # A copy reads and writes; here everything is read.
            floor_ms = 1e3 * shape.decode_bytes(batch, context) / lab.copy_bytes_per_s
        step = bench.decode_step(batch, context, rounds)
        round_ms(bench.executor, step)
        times = [round_ms(bench.executor, step) for _ in range(lab.runs)]
        target = None
        if name == "qwen3_0_6b" and batch == lab.pick(1, 2):
            target = Target(SMALL_STEP_MS, is_least=False)
        elif name != "qwen3_0_6b" and floor_ms:
            target = Target(STEP_TARGET * floor_ms, is_least=False)
        lab.add(f"{name}_decode_batch{batch}", times, "ms", floor=floor_ms or None, target=target)


def round_ms(executor: DeviceExecutor, step: Step) -> float:
    """Return the milliseconds of a round, from the first launch until the last token is read."""
    started, count = time.perf_counter(), 0
    for _ in executor.rounds(step, lambda: True):
        count += 1
    return 1e3 * (time.perf_counter() - started) / count


def prefill(lab: Lab, name: str, shape: Shape, bench: Bench) -> None:
    """Time prompts that are computed whole."""
    rng = np.random.default_rng(3)
    for tokens in lab.pick(PREFILLS, (20,)):
        step = bench.prefill_step(rng.integers(2, shape.vocab, tokens))
        bench.executor.execute(step)
        times = []
        for _ in range(min(lab.runs, 3 if tokens > LONG else lab.runs)):
            started = time.perf_counter()
            bench.executor.execute(step)
            times.append(time.perf_counter() - started)
        flops = shape.prefill_flops(tokens)
        rates = [flops / seconds / 1e12 for seconds in times]
        ceiling, target = lab.flops_per_s / 1e12 or None, None
        if ceiling and tokens == lab.pick(2048, 20):
            target = Target(PREFILL_TARGET * ceiling)
        lab.add(f"{name}_prefill_{tokens}", [1e3 * s for s in times], "ms")
        lab.add(f"{name}_prefill_{tokens}_rate", rates, "TFLOP/s", floor=ceiling, target=target)


def run_shape(lab: Lab, name: str) -> None:
    """Measure one shape: decode and prefill."""
    shape = pick_shape(lab, name)
    context, rounds, most, longest = lab.pick(
        (CONTEXT, ROUNDS, BATCHES[-1], PREFILLS[-1]), (20, 2, 2, 20)
    )
    num_tokens = max(most * -(-(context + rounds) // BLOCK_SIZE) * BLOCK_SIZE, longest)
    with loaded(lab, shape, "bfloat16") as (model, _):
        bench = Bench(model, shape, num_tokens, most)
        decode(lab, name, shape, bench)
        prefill(lab, name, shape, bench)


def hugging_face(lab: Lab, name: str) -> None:
    """Time Hugging Face's own steps, with its attention by torch and its growing cache."""
    shape = pick_shape(lab, name)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape.config))
        config = EngineConfig(model=folder, load_format="dummy", dtype="bfloat16")
        hf_config = read_config(Path(folder), config)
        peer = load_weights(config, hf_config, torch.bfloat16, lab.device)
    peer.set_attn_implementation("sdpa")
    context, rounds = lab.pick((CONTEXT, 8), (20, 1))
    with torch.inference_mode():
        for tokens in lab.pick(PREFILLS, (20,)):
            prompt = torch.randint(2, shape.vocab, (1, tokens), device=lab.device)
            times = _timed(lab, lambda ids=prompt: peer(ids, use_cache=True, logits_to_keep=1))
            lab.add(f"hugging_face_{name}_prefill_{tokens}", times, "ms")
        for batch in lab.pick(BATCHES, (2,)):
            tokens = torch.randint(2, shape.vocab, (batch, context), device=lab.device)
            cache = peer(tokens[:, :-1], use_cache=True, logits_to_keep=1).past_key_values

            def steps(last: torch.Tensor = tokens[:, -1:], cache: object = cache) -> None:
                for _ in range(rounds):
                    peer(last, past_key_values=cache, use_cache=True)

            times = [ms / rounds for ms in _timed(lab, steps)]
            lab.add(f"hugging_face_{name}_decode_batch{batch}", times, "ms")
            del cache, steps


def _timed(lab: Lab, act: Callable[[], object]) -> list[float]:
    """Return milliseconds of a few calls, the first one not among them."""
    times = []
    for _ in range(1 + min(5, lab.runs)):
        lab.wait()
        started = time.perf_counter()
        act()
        lab.wait()
        times.append(1e3 * (time.perf_counter() - started))
    return times[1:]


CHECKS = (Measure("graphs, operations and Hugging Face agree", check, least_s=20.0, limit_s=120.0),)
MEASURES = tuple(
    Measure(f"model {name}", partial(run_shape, name=name), least_s=25.0, limit_s=150.0)
    for name in SHAPES
)
PEERS = tuple(
    Measure(f"Hugging Face {name}", partial(hugging_face, name=name), least_s=20.0)
    for name in SHAPES
)
"""Last of all: when there is no time left, these are what can be done without."""
