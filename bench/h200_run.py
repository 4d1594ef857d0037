"""Runs the measures of `h200.py` one after the other, and makes a table of what they found.

Used by `h200.py`; run that, not this.
"""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from subprocess import SubprocessError

import torch
from h200.lab import Absent, Lab, Measure, Wrong
from msgspec import MsgspecError
from triton.errors import TritonError

from penstock.core.errors import PenstockError

FAILURES = (
    ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError,
    ValueError, SubprocessError, MsgspecError, TritonError, PenstockError,
)  # fmt: skip
"""What a part may end with; an out-of-memory error of torch is a RuntimeError."""


def run_all(
    lab: Lab, measures: Sequence[Measure], deadline_s: float, output: str | None = None
) -> int:
    """Run measures until the deadline, keeping what there is after each; return how many failed."""
    started, failed = time.monotonic(), 0
    for measure in measures:
        if time.monotonic() - started > deadline_s:
            print(f"LEFT OUT, no time: {measure.name}")
            continue
        print(f"{measure.name}:", flush=True)
        try:
            measure.run(lab)
        except Absent as reason:
            print(f"  SKIPPED: {reason}")
        except Wrong as reason:
            print(f"  WRONG: {reason}")
            return failed + 1
        except FAILURES:
            # One part that fails must not cost the figures of the others: the device is lent.
            print(f"  FAILED: {traceback.format_exc()}")
            failed += 1
        if not lab.is_dry:
            lab.report.keep(output)  # whoever stops the run leaves that
        if lab.is_cuda:
            torch.cuda.empty_cache()
    print(f"took {time.monotonic() - started:.0f} s")
    return failed


def finish(lab: Lab, output: str | None, table_file: str | None) -> None:
    """Keep the figures, and print the table; of a walk through nothing is kept."""
    if lab.is_dry:
        with tempfile.TemporaryDirectory() as folder:
            lab.report.finish(output or str(Path(folder) / "h200.json"))
        print("a walk through: these times mean nothing, and were not kept")
        return
    table = markdown(lab)
    print(table)
    if table_file:
        Path(table_file).write_text(table + "\n", encoding="utf-8")
    lab.report.finish(output)


def markdown(lab: Lab) -> str:
    """Return the figures as a table for the README."""
    lines = ["| figure | found | floor or ceiling | target |", "|---|---|---|---|"]
    for row in lab.rows:
        floor = "" if row.floor is None else f"{row.floor:.3g}"
        target = ""
        if row.target is not None:
            bound = "at least" if row.target.is_least else "at most"
            verdict = "met" if row.target.is_met(row.value) else "missed"
            target = f"{bound} {row.target.value:.3g}: {verdict}"
        lines.append(f"| `{row.key}` | {row.value:.4g} {row.unit} | {floor} | {target} |")
    return "\n".join(lines)
