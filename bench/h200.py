"""Penstock on one GPU: first whether it is right, then how fast, beside what the hardware allows.

Correctness comes first, and a wrong result ends the run: kernels against float64, codecs and
digests against the CPU, hand-offs against what the other process has, tokens of graphs, of single
operations, of Hugging Face and of two workers against one another. Then: copy and product ceilings;
attention by batch and context; codecs and digests; what a step reads with keys and values in bf16,
fp8 and int4; hand-offs between two processes by CUDA IPC, in one copy and layer by layer; offload
and onboard; decode steps and prefills of whole models; prefill and decode in two processes. A part
that is not here (FlashInfer, FA3) is named with the reason and left out. A measure that would begin
behind the deadline is left out and named.

    python bench/h200.py [--only PART] [--without PART] [--output FILE] [--table FILE]
    python bench/h200.py --dry-run

`--dry-run` walks every path without a GPU, the kernels in Triton's interpreter, with the smallest
sizes: its times mean nothing and are not kept.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

DEADLINE_S = 520.0


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="walk every path without a GPU")
    parser.add_argument("--only", action="append", help="parts whose name begins so")
    parser.add_argument("--without", action="append", help="not those whose name begins so")
    parser.add_argument("--deadline-s", type=float, default=DEADLINE_S)
    parser.add_argument("--output", help="results file")
    parser.add_argument("--table", help="file for the table in Markdown")
    return parser.parse_args()


def main() -> int:
    """Run what the flags ask for; return how many parts were wrong or failed."""
    options = arguments()
    if options.dry_run:
        # Before Triton is imported, which decides then.
        os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from h200 import attention, ceilings, codecs, disaggregated, encoded_kv, handoff, models, tiers
    from h200.lab import Lab, Measure
    from h200_run import finish, run_all
    from report import Report

    if not options.dry_run and not torch.cuda.is_available():
        print("there is no GPU here: --dry-run walks the same paths on the CPU")
        return 1
    device = torch.device("cpu" if options.dry_run else "cuda")
    name = "none: a walk through" if options.dry_run else torch.cuda.get_device_name(device)
    report = Report("h200", settings={"gpu": name, "torch": torch.__version__})
    if options.dry_run:
        torch.set_num_threads(1)
    lab = Lab(device, options.dry_run, report)
    subjects = (attention, codecs, encoded_kv, handoff, tiers, models, disaggregated)
    measures: list[Measure] = [measure for subject in subjects for measure in subject.CHECKS]
    measures += [*ceilings.MEASURES, *(m for subject in subjects for m in subject.MEASURES)]
    if options.only:
        measures = [m for m in measures if m.name.startswith(tuple(options.only))]
    if options.without:
        measures = [m for m in measures if not m.name.startswith(tuple(options.without))]
    failed = run_all(lab, measures, options.deadline_s, options.output)
    finish(lab, options.output, options.table)
    return failed


if __name__ == "__main__":
    sys.exit(main())
