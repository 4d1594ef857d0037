"""The benchmark for a GPU walks every path on a CPU, and goes on behind what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str, program: str = "bench/h200.py") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *([program] if program.endswith(".py") else ["-c", program])]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, cwd=ROOT, check=False, timeout=480
    )


def walk(kept: Path, *which: str) -> tuple[dict[str, float], dict[str, str]]:
    """Return the figures and the outcome of each part."""
    done = run("--dry-run", *which, "--output", str(kept))
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(kept.read_text())
    return record["figures"], {name: of["outcome"] for name, of in record["sections"].items()}


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_every_path_is_walked(tmp_path):
    # Two workers on a device are walked through by `test_h200_pair.py` and `test_device.py`.
    rest = "--without", "two workers", "--without", "prefill and decode"
    figures, outcomes = walk(tmp_path / "h200.json", *rest)
    assert set(outcomes.values()) == {"done"}, outcomes
    for key in (
        "copy", "product", "attention_error", "block_major_over_layer_major", "int4_encode",
        "digest", "ipc_pull_one_copy", "one_copy_over_layer_wise", "fa3_prefill_40",
        "flashinfer_decode_batch2_context40", "kv_int4_attention_of_a_layer", "offload_int4",
        "qwen3_0_6b_decode_batch2", "qwen3_8b_decode_batch2", "llama_8b_prefill_20",
        "onboard", "hugging_face_llama_8b_prefill_20",
    ):  # fmt: skip
        assert figures[key] > 0, key


GOES_ON = """
import argparse, importlib.util, json, os, sys, tempfile, time
from pathlib import Path
sys.path[:0] = ["bench", "."]
import torch
import h200_run
from h200.lab import Absent, Lab, Measure, Target, Wrong
from report import Report

def wrong(lab): raise Wrong("one bit")
def breaks(lab): raise ValueError("a bug")
def absent(lab): raise Absent("no such part")
def figure(lab): lab.add("after", [1.0], "s", floor=0.5, target=Target(2.0))
def dies(lab): os._exit(9)
def hangs(lab): time.sleep(60)
def late(lab):
    lab.ends_at = time.time() - 1.0
    lab.add("late", [1.0], "s")

parts = [
    Measure("absent", absent), Measure("breaks", breaks), Measure("wrong", wrong),
    Measure("dies", dies), Measure("hangs", hangs, limit_s=0.2), Measure("figure", figure),
    Measure("long", figure, least_s=1e9), Measure("late", late), Measure("behind", figure),
]
kept, started = Path(tempfile.mkdtemp()) / "kept.json", []

def start(kept, began, deadline_s):
    started.append(began)
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    report = Report("h200")
    if kept.exists():
        report.resume(str(kept))
    lab = Lab(torch.device("cpu"), False, report, str(kept), began + deadline_s)
    os._exit(h200_run.run_all(lab, parts))

spec = importlib.util.spec_from_file_location("program", "bench/h200.py")
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)
program.start = start
options = argparse.Namespace(deadline_s=50.0, dry_run=False, table=None)
assert program.supervise(kept, options) == 4  # breaks, wrong, dies, hangs
assert len(started) == 3, started
record = json.loads(kept.read_text())
outcomes = {name: of["outcome"] for name, of in record["sections"].items()}
print(json.dumps(outcomes))
assert "ValueError: a bug" in record["sections"]["breaks"]["reason"]
assert record["figures"] == {"after": 1.0, "late": 1.0}
"""


def test_no_part_ends_the_run_and_each_has_an_outcome():
    done = run(program=GOES_ON)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"absent"')]
    assert json.loads(line) == {
        "absent": "not here", "breaks": "failed", "wrong": "wrong", "dies": "died",
        "hangs": "died", "figure": "done", "long": "left out", "late": "cut short",
        "behind": "left out",
    }  # fmt: skip
    assert "LEFT OUT: behind: 0 s are left, and it takes 5" in done.stdout
    assert "WRONG: wrong: one bit" in done.stdout
    assert "| `after` | 1 s | 0.5 | at least 2: missed |" in done.stdout
    assert "Timeout" in done.stderr  # where every thread of what hangs was


def test_without_a_gpu_it_says_so():
    done = run()
    if done.returncode == 0:
        pytest.skip("there is a GPU")
    assert "--dry-run" in done.stdout
