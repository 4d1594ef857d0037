"""How fast the engine is on one core: decode time per step and prefill rate, in bf16, beside vLLM.

Ours is the worker core with its executor, in one process, everything included but messages. The
peer, where its interpreter is given, is vLLM's CPU back end in one process (no engine process, no
tokeniser), eager and compiled; it is judged by whichever is faster. All sides are up at the same
time on the same core, and take turns, so a drift of the machine hits all of them. Weights are
random; the shapes are a 4-layer Llama of width 256 and Qwen3-0.6B.

    python bench/engine.py [--peer-python PATH] [--quick] [--core N] [--output FILE]

`..._over_peer_...` is how much better ours is: above 1, ours is ahead. `floor_ms_...` is the time
that reading the weights once takes at the memory rate measured beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parent.parent))

from report import Report

HERE = Path(__file__).parent

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SHAPES: dict[str, dict[str, object]] = {
    "tiny": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "vocab_size": 4096,
    },
    "qwen3_0_6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
}
COMMON: dict[str, object] = {
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_parameters": ROPE,
    "tie_word_embeddings": True,
}
CONTEXT = 64
MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, MAX_MODEL_LEN = 32, 2048, 2048


@dataclass(frozen=True)
class Load:
    """A measurement. Decode: so many sequences for so many steps. Prefill: so many prompts."""

    kind: str
    num_seqs: int
    amount: int
    """Steps of a decode; tokens of each prompt of a prefill."""


LOADS = {
    "n1": Load("decode", 1, 100),
    "n8": Load("decode", 8, 60),
    "n32": Load("decode", 32, 30),
    "prefill": Load("prefill", 4, 512),
}


def smaller(load: Load) -> Load:
    """Return what a model a hundred times as large is asked for."""
    if load.kind == "decode":
        return Load("decode", load.num_seqs, max(4, load.amount // 8))
    return Load("prefill", 1, load.amount)


class Side:
    """A process that measures one engine when asked, and is idle otherwise."""

    def __init__(self, name: str, python: str, script: str, folder: Path, core: int) -> None:
        self.name = name
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [python, str(HERE / script), "--serve", name, str(folder), str(core)]
        self._log = folder / f"{name}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def wait_ready(self) -> bool:
        """Return whether it came up."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip() == "ready"

    def measure(self, load: Load) -> float:
        """Return milliseconds per step, or tokens per second of a prefill."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(vars(load)), file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def log_end(self) -> str:
        """Return the last lines of what it wrote to its error stream."""
        return " | ".join(self._log.read_text().strip().splitlines()[-3:])[-500:]

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--peer-python", help="interpreter that can import vllm")
    parser.add_argument("--quick", action="store_true", help="the tiny shape only, peer eager only")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: all")
    parser.add_argument("--load", choices=LOADS, action="append", help="default: all")
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", help="where to keep the results as JSON")
    options = parser.parse_args()
    settings = {
        "core": options.core,
        "context": f"{CONTEXT} tokens when decoding starts",
        "peer": "vllm" if options.peer_python else "none",
    }
    report = Report("engine", settings=settings)
    for shape in ["tiny"] if options.quick else options.shape or SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            config = {**COMMON, **SHAPES[shape]}
            (Path(folder) / "config.json").write_text(json.dumps(config))
            measure_shape(report, shape, Path(folder), options)
    report.finish(options.output)


def measure_shape(report: Report, shape: str, folder: Path, options: argparse.Namespace) -> None:
    """Measure every load of one shape on every side."""
    scripts = {"ours": (sys.executable, "engine.py")}
    if options.peer_python:
        modes = ["eager"] if options.quick else ["eager", "compiled"]
        scripts |= dict.fromkeys(modes, (options.peer_python, "engine_peer.py"))
    sides: list[Side] = []
    up: list[Side] = []
    is_tiny = shape == "tiny"
    try:
        for name, script in scripts.items():
            sides.append(Side(name, *script, folder, options.core))
            # One after the other: starting together, they would fight for the machine.
            if is_up(sides[-1]):
                up.append(sides[-1])
        for name in options.load or LOADS:
            load = LOADS[name] if is_tiny else smaller(LOADS[name])
            key = (
                f"decode_{{}}_{shape}_{name}" if load.kind == "decode" else f"prefill_{{}}_{shape}"
            )
            compare(report, key, load, up, options.runs)
            report.keep(options.output)  # a run that is stopped leaves what it has
        if not is_tiny and not options.load:
            floor = [up[0].measure(Load("floor_ms", 1, 1)) for _ in range(options.runs)]
            report.add(f"floor_ms_{shape}", floor, "ms", note="reading the weights once")
    finally:
        for side in sides:
            side.stop()


def is_up(side: Side) -> bool:
    """Wait for a side; say so when it fails."""
    if side.wait_ready():
        return True
    if side.name == "ours":
        raise SystemExit(f"our side did not start: {side.log_end()}")
    print(f"  vllm {side.name} did not start: {side.log_end()}", flush=True)
    return False


def compare(report: Report, key: str, load: Load, sides: list[Side], runs: int) -> None:
    """Let the sides take turns at one load; note each, and how ours stands to the best peer."""
    is_decode = load.kind == "decode"
    what, unit = ("ms", "ms/step") if is_decode else ("tokens_per_s", "tokens/s")
    for side in sides:
        side.measure(load)  # warms up
    figures: dict[str, list[float]] = {side.name: [] for side in sides}
    for _ in range(runs):
        for side in sides:
            figures[side.name].append(side.measure(load))
    ours = figures.pop("ours")
    report.add(key.format(what), ours, unit)
    for name, peer in figures.items():
        report.add(f"peer_{name}_{key.format(what)}", peer, unit)
    if figures:
        best = (min if is_decode else max)(figures.values(), key=median)
        pairs = zip(best, ours, strict=True)
        ratios = [peer / own if is_decode else own / peer for peer, own in pairs]
        report.add(key.format("over_peer"), ratios, "x", note="above 1 is ahead")


# ----------------------------------------------------------------------------------- our own side


class Engine:
    """A worker core and an executor, driven by hand."""

    def __init__(self, folder: str) -> None:
        import torch

        from penstock.core.config import EngineConfig, WorkerConfig
        from penstock.core.types import Role, WorkerId
        from penstock.engine.executor import ModelExecutor
        from penstock.engine.loading import load_model
        from penstock.engine.model import num_blocks
        from penstock.worker.worker import Worker

        torch.set_num_threads(1)
        config = EngineConfig(model=folder, load_format="dummy", dtype="bfloat16")
        self.model = load_model(config, lambda *_: None)
        layout = self.model.layout(32)
        limits = {"max_num_seqs": MAX_NUM_SEQS, "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS}
        counts = num_blocks(layout, 1 << 30, **limits)
        inner = (2, layout.block_size, layout.num_kv_heads, layout.head_dim)
        pools = [
            torch.zeros(count, len(group.layers), *inner, dtype=torch.bfloat16)
            for group, count in zip(layout.groups, counts, strict=True)
        ]
        self.executor = ModelExecutor(self.model, tuple(pools))
        self.worker = Worker(
            WorkerConfig(
                worker_id=WorkerId("bench"),
                role=Role.MIXED,
                epoch=1,
                layout=layout,
                num_blocks=counts,
                max_model_len=MAX_MODEL_LEN,
                is_prefix_caching=False,
                **limits,
            )
        )
        self._pending: object | None = None
        self._count = 0

    def add(self, num_tokens: int, max_tokens: int) -> None:
        """Take a greedy request in, with a prompt of its own."""
        from penstock.core.messages import Assign
        from penstock.core.request import Request, SamplingParams, Timeline

        self._count += 1
        prompt = tuple((self._count * 37 + i * 11) % 4000 for i in range(num_tokens))
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, seed=0)
        request = Request(request_id=f"r{self._count}", prompt_token_ids=prompt, params=params)
        self._handle(
            Assign(request=request, decode_worker=self.worker.config.worker_id, timeline=Timeline())
        )

    def step(self) -> int:
        """Run a step; return how many tokens it sampled, or -1 when there was none."""
        from penstock.core.events import StepDone

        if self._pending is None:
            return -1
        step, self._pending = self._pending, None
        started = time.monotonic_ns()
        sampled = self.executor.execute(step)
        finished = time.monotonic_ns()
        self._handle(
            StepDone(
                step_id=step.step_id, sampled=sampled, started_ns=started, finished_ns=finished
            )
        )
        return len(sampled)

    def _handle(self, event: object) -> None:
        from penstock.core.events import RunStep

        for command in self.worker.handle(event, time.monotonic_ns()):
            if isinstance(command, RunStep):
                self._pending = command.step

    def floor_ms(self) -> float:
        """Return how long reading the model's weights takes at this core's memory rate."""
        import numpy as np

        values = SHAPES["qwen3_0_6b"]
        assert self.model.vocab_size == values["vocab_size"]
        # Per layer: query, output, key and value, and three MLP matrices; then the tied head.
        layer = 1024 * (2 * 2048 + 2 * 1024 + 3 * 3072)
        weight_bytes = 2 * (28 * layer + 151936 * 1024)
        memory = np.ones(64 << 20, np.float32)
        seconds = min(_seconds(lambda: memory.sum()) for _ in range(3))
        return weight_bytes / (memory.nbytes / seconds) * 1e3


def _seconds(function: object) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def decode(engine: Engine, num_seqs: int, steps: int) -> float:
    """Return milliseconds per step with `num_seqs` sequences decoding."""
    for _ in range(num_seqs):
        engine.add(CONTEXT, steps + 4)
    while engine.step() < num_seqs:
        pass
    engine.step()
    started = time.perf_counter()
    for _ in range(steps):
        assert engine.step() == num_seqs
    elapsed = time.perf_counter() - started
    while engine.step() >= 0:
        pass
    return elapsed / steps * 1e3


def prefill(engine: Engine, num_seqs: int, num_tokens: int) -> float:
    """Return prompt tokens per second until each prompt has its first token."""
    started = time.perf_counter()
    for _ in range(num_seqs):
        engine.add(num_tokens, 1)
    while engine.step() >= 0:
        pass
    return num_seqs * num_tokens / (time.perf_counter() - started)


def serve(folder: str, core: int) -> None:
    """Answer measurements asked for on standard input."""
    os.sched_setaffinity(0, {core})
    engine = Engine(folder)
    print("ready", flush=True)
    for line in sys.stdin:
        load = Load(**json.loads(line))
        match load.kind:
            case "decode":
                answer = decode(engine, load.num_seqs, load.amount)
            case "prefill":
                answer = prefill(engine, load.num_seqs, load.amount)
            case _:
                answer = engine.floor_ms()
        print(answer, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[3], int(sys.argv[4]))
    else:
        main()
