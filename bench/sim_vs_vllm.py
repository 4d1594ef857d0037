"""How far is the simulator from a real engine on a real GPU that it has never seen?

The recorded run: vLLM 0.19 serving Llama-3.1-8B in bf16 on one RTX 4090, 300 ShareGPT requests at
10/s, far more than it can do, so that they queue for two minutes and blocks run out. Step times are
those of kernels measured one by one on that GPU (attention of mixed batches, dense layers, LM head
and sampler), fitted to the six coefficients; the simulator's worker has vLLM's settings and its
number of blocks. Nothing of the run itself is used, first. Then one number is: the host's time per
step, which no kernel has, from the requests that ended first (--share); the others are predicted.

Files of casys-kaist/LLMServingSim (MIT): bench/examples/RTX4090/Llama-3.1-8B/vllm/requests.jsonl
and profiler/perf/RTX4090/meta-llama/Llama-3.1-8B/bf16/tp1/*.csv, gzipped, as
RTX4090_Llama-3.1-8B_requests.jsonl.gz and
RTX4090_Llama-3.1-8B_tp1_{attention,dense,per_sequence}.csv.gz.

    python bench/sim_vs_vllm.py --data FOLDER [--share 0.3] [--output FILE]
"""

import argparse
import csv
import gzip
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from load import percentile
from report import Report

from penstock.core.config import ControllerConfig
from penstock.core.types import NS_PER_MS, NS_PER_S, Role
from penstock.sim.fleet import Member
from penstock.sim.profile import Hardware, StepTimes
from penstock.sim.recording import fit
from penstock.sim.serve import ModelledCluster, ServeSpec
from penstock.sim.workload import Arrival

STEM = "RTX4090_Llama-3.1-8B"
NUM_LAYERS = 32
ONCE = ("embedding", "final_layernorm")
TWICE = ("layernorm",)
BLOCK_SIZE, NUM_BLOCKS, MAX_SEQS, BATCHED_TOKENS, MODEL_LEN = 16, 2588, 256, 2048, 32768
CONTEXT_MAX = 4096
"""Compositions with longer contexts than the run had are not fitted to."""
BATCH_MAX = 64

Curve = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of the run; times in seconds, from the first arrival."""

    at_s: float
    input_tokens: int
    output_tokens: int
    ttft_s: float
    tpot_ms: float
    ended_s: float


def read_run(folder: Path) -> list[Asked]:
    """Return the requests in order of arrival.

    Arrivals are stamped by another clock than the engine's; the request that was queued soonest
    after its arrival says how far they are apart.
    """
    with gzip.open(folder / f"{STEM}_requests.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    apart_s = min(row["queued_ts"] - row["arrival_time"] for row in rows)
    start_s = min(row["arrival_time"] for row in rows) + apart_s
    asked = []
    for row in rows:
        at_s = row["arrival_time"] + apart_s
        gaps = max(row["output_toks"] - 1, 1)
        tpot_ms = (row["last_token_ts"] - row["first_token_ts"]) / gaps * 1e3
        tokens = row["input_toks"], row["output_toks"]
        ttft_s, ended_s = row["first_token_ts"] - at_s, row["last_token_ts"] - start_s
        asked.append(Asked(at_s - start_s, *tokens, ttft_s, tpot_ms, ended_s))
    return sorted(asked, key=lambda one: one.at_s)


def kernel_times(folder: Path) -> tuple[StepTimes, float]:
    """Return coefficients fitted to sums of kernels, prompts and decodes each alone, as the
    built-in profiles are, and the mean relative error of both.
    """
    dense = _curves(folder / f"{STEM}_tp1_dense.csv.gz", "tokens")
    once = _curves(folder / f"{STEM}_tp1_per_sequence.csv.gz", "sequences")
    prompts: list[tuple[float, ...]] = []
    decodes: list[tuple[float, ...]] = []
    with gzip.open(folder / f"{STEM}_tp1_attention.csv.gz", "rt", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            new, prefix = int(row["prefill_chunk"]), int(row["kv_prefill"])
            batch, context = int(row["n_decode"]), int(row["kv_decode"])
            is_too_much = max(prefix, context) > CONTEXT_MAX or batch > BATCH_MAX
            if is_too_much or bool(new) == bool(batch):
                continue
            time_ns = _step_ns(dense, once, new + batch, max(batch, 1), float(row["time_us"]))
            if new:
                prompts.append((1.0, new, new * (new + 2 * prefix), time_ns))
            else:
                decodes.append((1.0, batch, batch * context, time_ns))
    coefficients, errors = [], []
    for rows in (prompts, decodes):
        table, times_ns = np.array(rows)[:, :3], np.array(rows)[:, 3]
        fitted = fit(table, times_ns)
        coefficients += fitted
        errors += np.abs(table @ np.array(fitted) / times_ns - 1).tolist()
    return StepTimes(*(value / NS_PER_MS for value in coefficients)), float(np.mean(errors))


def _step_ns(
    dense: dict[str, Curve],
    once: dict[str, Curve],
    num_tokens: int,
    num_sequences: int,
    attention_us: float,
) -> float:
    """Return the sum of a step's kernels."""
    once_us = sum(float(np.interp(num_sequences, *curve)) for curve in once.values())
    layer_us = attention_us
    for name, curve in dense.items():
        time_us = float(np.interp(num_tokens, *curve))
        if name in ONCE:
            once_us += time_us
        else:
            layer_us += time_us * (2 if name in TWICE else 1)
    return (NUM_LAYERS * layer_us + once_us) * 1e3


def _curves(path: Path, by: str) -> dict[str, Curve]:
    points: dict[str, list[tuple[float, float]]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            points.setdefault(row["layer"], []).append((float(row[by]), float(row["time_us"])))
    return {
        name: (np.array([x for x, _ in sorted(all_)]), np.array([y for _, y in sorted(all_)]))
        for name, all_ in points.items()
    }


def simulate(asked: list[Asked], times: StepTimes, host_ms: float) -> list[Asked]:
    """Return what the requests get when every step takes `host_ms` longer than its kernels."""
    slower = replace(times, a=times.a + host_ms, d=times.d + host_ms)
    tokens = NUM_BLOCKS * BLOCK_SIZE
    hardware = Hardware("RTX4090", "llama3.1-8b", 1, tokens, slower, (NUM_BLOCKS,))
    spec = ServeSpec(
        members=(Member("mixed-0", Role.MIXED, hardware, 0),),
        controller=ControllerConfig(policy="least_loaded", wait_timeout_ns=3600 * NS_PER_S),
        block_size=BLOCK_SIZE,
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=BATCHED_TOKENS,
        max_model_len=MODEL_LEN,
    )
    arrivals = [
        Arrival(int(one.at_s * NS_PER_S), ((number, one.input_tokens),), one.output_tokens)
        for number, one in enumerate(asked, 2)
    ]
    seen = ModelledCluster(spec, arrivals).run(limit_s=3600)
    assert not seen.unfinished, seen.unfinished
    print(f"    {seen.preemptions} preemptions, {seen.num_steps} steps", flush=True)
    return [
        replace(
            one,
            ttft_s=served.ttft_s,
            tpot_ms=served.tpot_s * 1e3,
            ended_s=served.finished_ns / NS_PER_S,
        )
        for one, served in zip(asked, seen.served, strict=True)
    ]


def compare(report: Report, name: str, real: list[Asked], simulated: list[Asked]) -> None:
    """Print and keep what was and what is predicted."""
    figures = {
        "ttft_s_p50": [percentile([r.ttft_s for r in run], 0.5) for run in (real, simulated)],
        "ttft_s_p99": [percentile([r.ttft_s for r in run], 0.99) for run in (real, simulated)],
        "tpot_ms_p50": [percentile([r.tpot_ms for r in run], 0.5) for run in (real, simulated)],
        "tpot_ms_p99": [percentile([r.tpot_ms for r in run], 0.99) for run in (real, simulated)],
        "last_answer_s": [max(r.ended_s for r in run) for run in (real, simulated)],
    }
    for key, (was, is_now) in figures.items():
        error = is_now / was - 1
        print(f"  {name:<10} {key:<14} {was:>9.2f} {is_now:>9.2f}  {error:>+7.1%}")
        report.figures |= {
            f"{name}_{key}_real": was,
            f"{name}_{key}_simulated": is_now,
            f"{name}_{key}_error": abs(error),
        }


def main() -> None:
    """Run what the flags ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder with the recorded run and kernels")
    parser.add_argument("--share", type=float, default=0.3, help="of requests, to calibrate from")
    parser.add_argument("--output", help="results file")
    args = parser.parse_args()
    report = Report("sim_vs_vllm", settings={"calibrated from": f"{args.share:.0%} of requests"})
    asked = read_run(Path(args.data))
    times, fit_error = kernel_times(Path(args.data))
    report.figures["kernel_fit_error"] = fit_error
    print(f"  kernels: {times}, mean error of the fit {fit_error:.1%}")
    kernels = simulate(asked, times, 0.0)
    compare(report, "kernels", asked, kernels)
    first = sorted(range(len(asked)), key=lambda i: asked[i].ended_s)
    first = first[: int(args.share * len(first))]
    others = [i for i in range(len(asked)) if i not in set(first)]
    truth_ms = percentile([asked[i].tpot_ms for i in first], 0.5)
    guess_ms = percentile([kernels[i].tpot_ms for i in first], 0.5)
    host_ms = max(truth_ms - guess_ms, 0.0)
    report.figures["host_ms"] = host_ms
    print(f"  the host takes {host_ms:.2f} ms of each step of the {len(first)} that ended first")
    calibrated = simulate(asked, times, host_ms)
    compare(report, "others", [asked[i] for i in others], [calibrated[i] for i in others])
    report.finish(args.output)


if __name__ == "__main__":
    main()
