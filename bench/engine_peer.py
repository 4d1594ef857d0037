"""The vLLM side of `bench/engine.py`, run by an interpreter that has vllm and not penstock.

Everything in one process on one core, no tokeniser, prefix caching off, and the CPU back end's
settings at their best: bound to its core, bf16, CPU-sized KV cache.
"""

from __future__ import annotations

import json
import os
import sys
import time

CONTEXT = 64


def make_engine(folder: str, mode: str, core: int) -> object:
    """Return vLLM's engine."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND=str(core),
        VLLM_LOGGING_LEVEL="ERROR",
    )
    from vllm import LLM

    llm = LLM(
        model=folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=mode == "eager",
        max_model_len=2048,
        max_num_seqs=32,
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    return llm.llm_engine


class Peer:
    """vLLM's engine, a step at a time."""

    def __init__(self, engine: object) -> None:
        self.engine, self._count = engine, 0

    def add(self, num_tokens: int, max_tokens: int) -> None:
        """Take a greedy request in, with a prompt of its own."""
        from vllm import SamplingParams

        self._count += 1
        prompt = [(self._count * 37 + i * 11) % 4000 for i in range(num_tokens)]
        params = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        self.engine.add_request(f"r{self._count}", {"prompt_token_ids": prompt}, params)

    def decode(self, num_seqs: int, steps: int) -> float:
        """Return milliseconds per step with `num_seqs` sequences decoding."""
        for _ in range(num_seqs):
            self.add(CONTEXT, steps + 4)
        for _ in range(3):
            outputs = self.engine.step()
        assert len(outputs) == num_seqs
        started = time.perf_counter()
        for _ in range(steps):
            self.engine.step()
        elapsed = time.perf_counter() - started
        self.finish()
        return elapsed / steps * 1e3

    def prefill(self, num_seqs: int, num_tokens: int) -> float:
        """Return prompt tokens per second until each prompt has its first token."""
        started = time.perf_counter()
        for _ in range(num_seqs):
            self.add(num_tokens, 1)
        self.finish()
        return num_seqs * num_tokens / (time.perf_counter() - started)

    def finish(self) -> None:
        """Run until nothing is left."""
        while self.engine.has_unfinished_requests():
            self.engine.step()


def main() -> None:
    """Answer measurements asked for on standard input."""
    mode, folder, core = sys.argv[2], sys.argv[3], int(sys.argv[4])
    # vLLM and its libraries print as they please: answers go out by a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.sched_setaffinity(0, {core})
    peer = Peer(make_engine(folder, mode, core))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        load = json.loads(line)
        run = peer.decode if load["kind"] == "decode" else peer.prefill
        print(run(load["num_seqs"], load["amount"]), file=answers, flush=True)


if __name__ == "__main__":
    main()
