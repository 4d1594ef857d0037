"""Prefill and decode in two processes on one GPU, as `penstock serve` runs them: the tokens of one
worker, what the time to the first token went into, and how much of the hand-off anybody waited for.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from h200.lab import Lab, Measure, Wrong
from h200.models import Shape, pick_shape
from penstock import LLM, SamplingParams
from penstock.cli.cluster import BUILTIN_MODEL
from penstock.core.config import Handoff
from penstock.llm import RequestOutput

PROMPT_TOKENS, PROMPTS = 4096, 6
DRY_TOKENS = 36
"""Of a prompt where only the way is walked: two blocks and a half."""
MEMORY_SHARE = 0.8


@contextmanager
def cluster(lab: Lab, shape: Shape, dtype: str, device: str, **options: object) -> Iterator[LLM]:
    """Yield workers with random weights, the same in every process; they end behind."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = {**shape.config, "vocab_size": max(shape.vocab, 4096)}
        (folder / "config.json").write_text(json.dumps(config))
        for path in BUILTIN_MODEL.glob("token*"):
            shutil.copy(path, folder)
        engine = {"device": device, "load_format": "dummy"}
        if lab.is_cuda:
            engine["gpu_memory_utilization"] = MEMORY_SHARE
        # A prompt takes two steps, so that blocks of the first one cross during the second.
        options["max_num_batched_tokens"] = lab.pick(PROMPT_TOKENS, DRY_TOKENS) // 2
        with LLM(name, dtype=dtype, **engine, **options) as llm:
            yield llm


def device_of(lab: Lab) -> str:
    """Return the device's name as `--device` takes it."""
    return "cuda" if lab.is_cuda else "interpreter"


def prompts(lab: Lab, shape: Shape) -> list[list[int]]:
    """Return prompts that begin differently, so that none finds another's blocks."""
    count, length = lab.pick((PROMPTS, PROMPT_TOKENS), (2, DRY_TOKENS))
    rng = np.random.default_rng(4)
    return rng.integers(2, shape.vocab, (count, length)).tolist()


def generate(llm: LLM, lab: Lab, asked: list[list[int]]) -> list[RequestOutput]:
    """Return the outputs of prompts that follow one another; the first pays for what is new."""
    params = SamplingParams(temperature=0.0, seed=0, max_tokens=lab.pick(16, 2), ignore_eos=True)
    return [llm.generate([prompt], params)[0] for prompt in asked]


def check(lab: Lab) -> None:
    """Compare the tokens of two workers with those of one, in float32."""
    shape = pick_shape(lab, "qwen3_0_6b")
    asked = prompts(lab, shape)[:2]
    found = {}
    device = device_of(lab)
    for name, where, roles in (
        # Where only the way is walked, the one is a CPU's: quicker, and right as well.
        ("one worker", "cpu" if lab.is_dry else device, {"prefill": 0, "decode": 0, "mixed": 1}),
        ("two workers", device, {"prefill": 1, "decode": 1}),
    ):
        with cluster(lab, shape, "float32", where, **roles) as llm:
            outputs = generate(llm, lab, asked)
        found[name] = [output.token_ids for output in outputs]
        if name == "two workers" and not all("pull" in output.ledger for output in outputs):
            raise Wrong("nothing was handed off")
    if found["one worker"] != found["two workers"]:
        raise Wrong(f"tokens are not the same: {found}")


def ledger(lab: Lab) -> None:
    """Time prompts whose blocks cross as they are finished, and when all are."""
    shape = pick_shape(lab, "qwen3_8b")
    asked = prompts(lab, shape)
    pulls = {}
    for handoff in (Handoff.STREAM, Handoff.WHOLE):
        options = {"cluster_options": {"handoff": handoff}}
        dtype = lab.pick("bfloat16", "float32")  # which a worker checks once, and not twice
        with cluster(lab, shape, dtype, device_of(lab), **options) as llm:
            outputs = generate(llm, lab, asked)[1:]
        key = f"two_workers_{handoff.value}"
        for part in ("ttft", "prefill", "pull"):
            lab.add(f"{key}_{part}", [1e3 * output.ledger[part] for output in outputs], "ms")
        pulls[handoff] = [output.ledger["pull"] for output in outputs]
        between = [
            1e3 * (output.latency_s - output.ttft_s) / (len(output.token_ids) - 1)
            for output in outputs
        ]
        lab.add(f"{key}_tpot", between, "ms")
    num_bytes = len(asked[0]) * shape.token_bytes
    rates = [num_bytes / seconds / 1e12 for seconds in pulls[Handoff.WHOLE]]
    lab.add("two_workers_pull_rate", rates, "TB/s")
    pairs = zip(pulls[Handoff.STREAM], pulls[Handoff.WHOLE], strict=True)
    lab.add("two_workers_exposed_share", [exposed / whole for exposed, whole in pairs], "of it")


CHECKS = (Measure("two workers generate what one does", check, least_s=40.0, limit_s=180.0),)
MEASURES = (Measure("prefill and decode in two processes", ledger, least_s=60.0, limit_s=180.0),)
