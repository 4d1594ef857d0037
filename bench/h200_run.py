"""Runs the parts of `h200.py`, one after the other, in a process that may be lost with one of them.

Used by `h200.py`, which starts this process and looks at what it has left; run that, not this.
Every part gets an outcome in the results: "done", "wrong" (with what), "failed" (with the
traceback), "not here" (what is missing), "left out" and "cut short" (the deadline); a part that
takes the process along stays "running", and `h200.py` says that it died.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from subprocess import SubprocessError

import torch
from h200 import AGAIN, GRACE_S, NO_GPU
from h200.lab import Absent, Lab, Measure, OutOfTime, Wrong
from msgspec import MsgspecError
from report import Report
from triton.errors import TritonError

from penstock.core.errors import PenstockError

FAILURES = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NameError, OSError, RuntimeError,
    TypeError, ValueError, ImportError, SubprocessError, MsgspecError, TritonError, PenstockError,
)  # fmt: skip
"""What a part may end with; an out-of-memory error of torch is a RuntimeError."""
DRY_LIMIT_S = 900.0


def run_parts(options: argparse.Namespace) -> int:
    """Run the parts that the flags ask for and that have no outcome yet; return an exit status."""
    if not options.dry_run and not torch.cuda.is_available():
        print("there is no GPU here: --dry-run walks the same paths on the CPU")
        return NO_GPU
    device = torch.device("cpu" if options.dry_run else "cuda")
    name = "none: a walk through" if options.dry_run else torch.cuda.get_device_name(device)
    report = Report("h200", settings={"gpu": name, "torch": torch.__version__})
    kept = Path(options.output)
    if kept.exists() and kept.stat().st_mtime >= options.began:
        report.resume(options.output)  # a process before this one was lost
    if options.dry_run:
        torch.set_num_threads(1)
    lab = Lab(device, options.dry_run, report, options.output, options.began + options.deadline_s)
    return run_all(lab, chosen(options.only, options.without))


def chosen(only: Sequence[str] | None, without: Sequence[str] | None) -> list[Measure]:
    """Return the parts whose names begin as asked for, checks first."""
    from h200 import attention, ceilings, codecs, disaggregated, encoded_kv, handoff, models, tiers

    subjects = (attention, codecs, encoded_kv, handoff, tiers, models, disaggregated)
    measures: list[Measure] = [measure for subject in subjects for measure in subject.CHECKS]
    measures += [*ceilings.MEASURES, *(m for subject in subjects for m in subject.MEASURES)]
    measures += models.PEERS
    if only:
        measures = [m for m in measures if m.name.startswith(tuple(only))]
    if without:
        measures = [m for m in measures if not m.name.startswith(tuple(without))]
    return measures


def run_all(lab: Lab, measures: Sequence[Measure]) -> int:
    """Run parts until the deadline; return 0, or `AGAIN` when CUDA has to be begun anew."""
    for measure in measures:
        if measure.name in lab.sections:
            continue
        if lab.time_left_s < measure.least_s:
            left = f"{max(0.0, lab.time_left_s):.0f} s are left, and it takes {measure.least_s:.0f}"
            print(f"LEFT OUT: {measure.name}: {left}")
            lab.note(measure.name, "left out", left)
            continue
        print(f"{measure.name}:", flush=True)
        lab.note(measure.name, "running")
        started = time.monotonic()
        limit_s = DRY_LIMIT_S if lab.is_dry else min(measure.limit_s, lab.time_left_s + GRACE_S)
        # Where a kernel never ends no exception helps: every thread says where it is, and the end.
        faulthandler.dump_traceback_later(limit_s, exit=True)
        outcome, reason = run(lab, measure)
        faulthandler.cancel_dump_traceback_later()
        lab.note(measure.name, outcome, reason, time.monotonic() - started)
        print(f"  {outcome.upper()} in {time.monotonic() - started:.1f} s {reason}", flush=True)
        if lab.is_cuda and not is_sound():
            return AGAIN
    return 0


def run(lab: Lab, measure: Measure) -> tuple[str, str]:
    """Run one part; return its outcome and the reason."""
    try:
        measure.run(lab)
    except Absent as missing:
        return "not here", str(missing)
    except OutOfTime as late:
        return "cut short", str(late)
    except Wrong as difference:
        return "wrong", str(difference)
    except FAILURES:
        return "failed", traceback.format_exc()
    return "done", ""


def is_sound() -> bool:
    """Tell whether CUDA still works in this process: an illegal access ends it for good."""
    gc.collect()  # a model's graphs refer to each other
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(f"CUDA has to be begun anew: {error}")
        return False
    return True
