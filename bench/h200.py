"""Penstock on one GPU: first whether it is right, then how fast, beside what the hardware allows.

Correctness comes first: kernels against float64, codecs and digests against the CPU, hand-offs
against what the other process has, tokens of graphs, of single operations, of Hugging Face and of
two workers against one another. Then: copy and product ceilings; attention by batch and context;
codecs and digests; what a step reads with keys and values in bf16, fp8 and int4; hand-offs between
two processes by CUDA IPC, in one copy and layer by layer; offload and onboard; decode steps and
prefills of whole models; prefill and decode in two processes.

No part ends the run. What is wrong, breaks, hangs or takes its process along is noted with the
reason, and the rest goes on, in a new process where the old one's CUDA is gone. A part that is not
here (FlashInfer, FA3), and what would not end before the deadline, is named and left out. Results
are written after every figure.

    python bench/h200.py [--only PART] [--without PART] [--output FILE] [--table FILE]
    python bench/h200.py --dry-run

`--dry-run` walks every path without a GPU, with the smallest sizes: kernels in Triton's
interpreter, models with the heads of the real ones, doubles for the driver's library and for
FlashInfer and FA3. Its times mean nothing and are not kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from h200 import AGAIN, GRACE_S, NO_GPU

DEADLINE_S, DRY_DEADLINE_S = 520.0, 3600.0
RESULTS = Path(__file__).parent / "results" / "h200.json"
BAD = "wrong", "failed", "died"
"""Outcomes that count as failures; see `h200_run.py` for the others."""


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="walk every path without a GPU")
    parser.add_argument("--only", action="append", help="parts whose name begins so")
    parser.add_argument("--without", action="append", help="not those whose name begins so")
    parser.add_argument("--deadline-s", type=float)
    parser.add_argument("--output", help="results file")
    parser.add_argument("--table", help="file for the table in Markdown")
    parser.add_argument("--began", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.deadline_s is None:
        options.deadline_s = DRY_DEADLINE_S if options.dry_run else DEADLINE_S
    return options


def main() -> int:
    """Run what the flags ask for; return how many parts were wrong or failed."""
    options = arguments()
    if options.dry_run:
        # Before Triton is imported, which decides then.
        os.environ["TRITON_INTERPRET"] = "1"
    if options.began:
        from h200_run import run_parts

        return run_parts(options)
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(options.output or (f"{folder}/h200.json" if options.dry_run else RESULTS))
        return supervise(kept, options)


def supervise(kept: Path, options: argparse.Namespace) -> int:
    """Start processes until every part has an outcome; return how many parts were wrong."""
    began, under_way, code = time.time(), [""], AGAIN
    # A process that died in no part would die again.
    while under_way or code == AGAIN:
        code = start(kept, began, options.deadline_s)
        if code == NO_GPU:
            return 1
        record = read(kept, began)
        sections = record.get("sections", {})
        under_way = [name for name, of in sections.items() if of["outcome"] == "running"]
        for name in under_way:
            sections[name] |= {"outcome": "died", "reason": f"its process ended with {code}"}
            kept.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, of in sections.items():
        if of["outcome"] != "done":
            print(f"{of['outcome'].upper()}: {name}: {of['reason'].strip().splitlines()[-1]}")
    print(f"took {time.time() - began:.0f} s")
    table = markdown(record.get("rows", []))
    if options.table:
        Path(options.table).write_text(table + "\n", encoding="utf-8")
    print("a walk through: these times mean nothing" if options.dry_run else table)
    return sum(of["outcome"] in BAD for of in sections.values()) or int(code != 0)


def start(kept: Path, began: float, deadline_s: float) -> int:
    """Run the parts that have no outcome yet in a process of their own; return how it ended."""
    limit_s = max(1.0, began + deadline_s + 4 * GRACE_S - time.time())
    # Of a flag that is given twice the last one counts.
    program = [sys.executable, *sys.argv, "--output", str(kept), "--began", str(began)]
    try:
        return subprocess.run(program, timeout=limit_s, check=False).returncode
    except subprocess.TimeoutExpired:
        return -1


def read(kept: Path, began: float) -> dict[str, Any]:
    """Return what this run has written down so far."""
    is_ours = kept.exists() and kept.stat().st_mtime >= began
    return json.loads(kept.read_text(encoding="utf-8")) if is_ours else {}


def markdown(rows: list[dict[str, object]]) -> str:
    """Return the figures as a table for the README."""
    lines = ["| figure | found | floor or ceiling | target |", "|---|---|---|---|"]
    for row in rows:
        floor = "" if row["floor"] is None else f"{row['floor']:.3g}"
        target = ""
        if row["target"] is not None:
            bound = "at least" if row["is_least"] else "at most"
            target = f"{bound} {row['target']:.3g}: {'met' if row['is_met'] else 'missed'}"
        lines.append(f"| `{row['key']}` | {row['value']:.4g} {row['unit']} | {floor} | {target} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
