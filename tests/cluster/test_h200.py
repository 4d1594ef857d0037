"""The benchmark for a GPU walks every path on a CPU, and stops at what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str, program: str = "bench/h200.py") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *([program] if program.endswith(".py") else ["-c", program])]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, cwd=ROOT, check=False, timeout=280
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_path_is_walked(tmp_path):
    kept = tmp_path / "h200.json"
    # Workers on a device are walked through by `test_device.py`.
    rest = "--without", "two workers", "--without", "prefill and decode"
    done = run("--dry-run", *rest, "--output", str(kept))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    assert "LEFT OUT" not in done.stdout
    # Nothing is left out without a word: what is not installed is named.
    skipped = [line for line in done.stdout.splitlines() if "SKIPPED" in line]
    reasons = "not installed", "on a GPU alone", "the same path"
    assert all(any(reason in line for reason in reasons) for line in skipped), skipped
    figures = json.loads(kept.read_text())["figures"]
    for key in (
        "copy", "product", "attention_error", "block_major_over_layer_major", "int4_encode",
        "digest", "ipc_pull_one_copy", "one_copy_over_layer_wise",
        "kv_int4_attention_of_a_layer", "offload_int4", "onboard",
        "qwen3_0_6b_decode_batch2", "qwen3_0_6b_prefill_20",
    ):  # fmt: skip
        assert figures[key] > 0, key


STOPS = """
import sys, time
sys.path[:0] = ["bench", "."]
import tempfile
import torch
import h200_run
from h200.lab import Absent, Lab, Measure, Target, Wrong
from report import Report

def wrong(lab): raise Wrong("one bit")
def breaks(lab): raise ValueError("a bug")
def absent(lab): raise Absent("no such part")
def figure(lab): lab.add("after", [1.0], "s", target=Target(2.0))

kept = tempfile.mkdtemp() + "/kept.json"
lab = Lab(torch.device("cpu"), False, Report("h200"))
parts = [Measure("a", absent), Measure("b", breaks), Measure("c", figure)]
assert h200_run.run_all(lab, parts, 60.0, kept) == 1
ends = [Measure("d", wrong), Measure("e", figure)]
assert h200_run.run_all(lab, ends, 60.0, kept) == 1
assert h200_run.run_all(lab, parts, -1.0, kept) == 0
assert "after" in open(kept).read()
print(h200_run.markdown(lab))
"""


def test_a_wrong_result_ends_the_run_and_a_part_that_breaks_does_not():
    done = run(program=STOPS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SKIPPED: no such part" in done.stdout
    assert "ValueError: a bug" in done.stdout
    assert "WRONG: one bit" in done.stdout
    assert done.stdout.count("e:\n") == 0
    assert done.stdout.count("LEFT OUT, no time") == 3
    assert "| `after` | 1 s |  | at least 2: missed |" in done.stdout


def test_without_a_gpu_it_says_so():
    done = run()
    if done.returncode == 0:
        pytest.skip("there is a GPU")
    assert "--dry-run" in done.stdout
