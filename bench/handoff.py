"""How much of the time to first token does the hand-off leave exposed?

`penstock serve` with one prefill and one decode worker; prompts nobody has seen, one at a time, no
other load. The server's own ledger says what the time went into; exposed is what lies between the
end of prefill and the first decode step: the offer's way, waiting for room, and the pull, its
digests verified. Three ways to hand off, in turn: stream pulls blocks as they are finished, whole
when all are, push writes them into blocks that were granted before the prefill began. `held_ms` is
how long the decode worker's blocks were taken before the request could use them. Twice: the
built-in model, and a decoder of Qwen3-0.6B's shape with random weights (the time does not depend on
them), whose folder is made here, with the built-in tokenizer and so a vocabulary of 4,096. --model
takes a folder of your own in place of both. Both workers may use all cores, since only one of them
works at a time: that makes TTFT smallest and the share largest. The pools are fresh, so most pages
of the decode worker's are touched for the first time by a pull.

    python bench/handoff.py [--model FOLDER] [--transport auto|shm|tcp] [--threads N]
                            [--handoff stream|whole|push] [--only tiny|0.6b] [--quick]
                            [--output FILE]
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from report import Report
from serve import server

import penstock

BUILTIN = Path(penstock.__file__).parent / "builtin" / "penstock-tiny"
WAYS = ("stream", "whole", "push")
LENGTHS = (256, 512, 1024, 2048, 4096)
TARGET_SHARE = 0.02
TARGET_FROM_TOKENS = 2048
RUNS = 5
# This rule always hands off; ours would rather let one idle worker do both.
PAIR = ("--prefill", "1", "--decode", "1", "--policy", "least_loaded")
HANDOFF = ("offer", "wait_for_room", "pull")
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "dtype": "bfloat16",
    "eos_token_id": 0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 8192,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "vocab_size": 4096,
}


def make_model(folder: Path) -> None:
    """Write a model folder of Qwen3-0.6B's shape without weights."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN / name, folder)
    (folder / "config.json").write_text(json.dumps(QWEN3_06B), encoding="utf-8")


def ask(port: int, prompt: list[int]) -> dict[str, Any]:
    """Return the ledger of one completion of two tokens."""
    body = {"prompt": prompt, "max_tokens": 2, "ignore_eos": True, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "x-penstock-ledger": "1"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        ledger: dict[str, Any] = json.load(answer)["penstock_ledger"]
    return ledger


def bench(
    report: Report,
    name: str,
    flags: list[str],
    lengths: tuple[int, ...],
    ways: tuple[str, ...],
    output: str | None,
) -> None:
    """Measure one model at all lengths, the ways in turn at each: what changes meanwhile, changes
    for all of them.
    """
    with ExitStack() as stack:
        ports = {way: stack.enter_context(server(*flags, "--handoff", way, *PAIR)) for way in ways}
        rng = random.Random(0)
        for port in ports.values():
            ask(port, fresh(rng, lengths[0]))
        for wanted in lengths:
            length = min(wanted, *map(max_prompt, ports.values()))
            ledgers: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
            for _ in range(RUNS):
                for way, port in ports.items():
                    ledgers[way].append(ask(port, fresh(rng, length)))
            for way in ways:
                report_length(report, f"{name}_{way}_{wanted}", length, ledgers[way])
            report.keep(output)  # the next length may take minutes


def fresh(rng: random.Random, length: int) -> list[int]:
    """Return a prompt that nobody has seen."""
    return [rng.randrange(300, 4000) for _ in range(length)]


def max_prompt(port: int) -> int:
    """Return the longest prompt that leaves room for the two tokens."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=10) as answer:
        return int(json.load(answer)["data"][0]["max_model_len"]) - 2


def report_length(report: Report, of: str, length: int, ledgers: list[dict[str, Any]]) -> None:
    """Add the figures of one length, and say which way the blocks came."""
    shares = [sum(row[part] for part in HANDOFF) / row["ttft"] for row in ledgers]
    unseen = all(row["cached_tokens"] == 0 and row["pull_bytes"] for row in ledgers)
    assert unseen, f"{of}: a prompt was known already, or was not handed off"
    last = ledgers[-1]
    spans = statistics.median(row["pull_spans"] for row in ledgers)
    moves = statistics.median(row["pull_moves"] for row in ledgers)
    size = f"{length} tokens, {last['pull_bytes']} bytes"
    way = f"{size}, {last['transport']}, {spans:g} spans in {moves:g} moves"
    report.add(f"exposed_share_{of}", shares, note=way)
    report.add(f"ttft_ms_{of}", [row["ttft"] * 1e3 for row in ledgers], "ms")
    for part in HANDOFF:
        report.add(f"{part}_ms_{of}", [row[part] * 1e3 for row in ledgers], "ms")
    report.add(f"held_ms_{of}", [row["held"] * 1e3 for row in ledgers], "ms")


def report_target(report: Report) -> None:
    """Say which lengths meet the target."""
    for key, share in report.figures.items():
        is_aimed_at = "_stream_" in key and int(key.rsplit("_", 1)[1]) >= TARGET_FROM_TOKENS
        if key.startswith("exposed_share_") and is_aimed_at:
            verdict = "met" if share <= TARGET_SHARE else "missed"
            print(f"  {key}: {share:.2%}, target at most {TARGET_SHARE:.0%}: {verdict}")


def main() -> None:
    """Run what the flags ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="a model folder, measured instead of the two")
    parser.add_argument("--transport", choices=("auto", "shm", "tcp"), default="auto")
    parser.add_argument("--handoff", choices=WAYS, help="one way alone")
    parser.add_argument(
        "--quick", action="store_true", help="within 45 s: the built-in model alone"
    )
    parser.add_argument("--only", choices=("tiny", "0.6b"), help="one of the two models alone")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each worker")
    parser.add_argument("--output", help="results file")
    args = parser.parse_args()
    settings = {"transport": args.transport, "load": "none", "threads": args.threads}
    report = Report("_".join(filter(None, ("handoff", args.only, args.handoff))), settings=settings)
    lengths = (256, 2048, 4096) if args.quick else LENGTHS
    ways = (args.handoff,) if args.handoff else WAYS if args.transport != "tcp" else WAYS[:2]
    common = ["--transport", args.transport, "--threads", str(args.threads)]
    if args.model:
        bench(report, "model", [args.model, *common], lengths, ways, args.output)
    elif args.only != "0.6b":
        bench(report, "tiny", common, lengths, ways, args.output)
    if not args.model and args.only != "tiny" and (args.only or not args.quick):
        with tempfile.TemporaryDirectory() as folder:
            make_model(Path(folder))
            flags = [folder, "--load-format", "dummy", "--kv-cache-memory", "1GiB", *common]
            bench(report, "0.6b", flags, lengths, ways, args.output)
    report_target(report)
    report.finish(args.output)


if __name__ == "__main__":
    main()
