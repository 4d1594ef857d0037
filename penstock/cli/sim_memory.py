"""`penstock sim memory`: KVFlow's published table, and what is honest to say beside it.

Tables go to standard output, progress to standard error; with `--json` standard output is one JSON
object and nothing else. `add_memory` is called when the command line is read, so nothing heavy is
imported before `memory` runs.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.core.errors import BadRequest, StartupFailed

if TYPE_CHECKING:
    from penstock.cli.sim_arguments import Commands
    from penstock.sim.accesses import Accesses
    from penstock.sim.memory_study import Row

_DESCRIPTION = """\
Simulate the memory of one accelerator: SRAM, HBM, CXL and DRAM, driven by the very KV orchestrator
that a worker uses. Without an option: KVFlow's experiment as published and, by an accounting that
charges for everything, the uncompressed baseline beside ours, each with the same liberties.
"""

_EXAMPLES = """\
examples:
  penstock sim memory                        the published table, and the honest one
  penstock sim memory --exact                the published table alone, to the digit
  penstock sim memory --sweep --chart frontier.svg
  penstock sim memory --pressure --heads full_attention_heads.tsv --tenants 6 --context 32768
  penstock sim memory --accesses recorded.jsonl.gz --json

--heads is a table of scores, layers x KV heads, such as DuoAttention publishes; the better half of
the heads reads from the whole context. Traces of what real decoding reads are not published, so
record some: --accesses is what penstock serve --record-kv-access wrote, one JSON object a line:
  {"step": 0, "layer": 0, "group": 3, "request": "a", "blocks": [0, 63], "mass": [0.7, 0.3]}
--mass 0.95 reads the fewest blocks that hold so much of each head's attention.
"""


def add_memory(acts: "Commands") -> None:
    """Add `penstock sim memory`."""
    parser = acts.add_parser(
        "memory",
        help="simulate the memory hierarchy of one accelerator",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--exact", action="store_true", help="KVFlow's published run only, in its own accounting")
    add("--sweep", action="store_true", help="vary tier sizes, bandwidths, codec costs, prefetch")
    add("--pressure", action="store_true", help="several sequences, more than HBM holds")
    add("--accesses", metavar="FILE", help="simulate recorded accesses (JSON lines)")
    add("--mass", type=_share, default=1.0, metavar="SHARE", help="of --accesses (default 1: all)")
    add("--heads", metavar="FILE", help="scores of heads for --pressure (default: half and half)")
    add("--layers", type=_count, default=8, metavar="N", help="of --heads, evenly (default 8)")
    add("--tenants", type=_count, default=6, metavar="N", help="sequences (default 6)")
    add("--context", type=_count, default=32768, metavar="N", help="tokens (default 32768)")
    add("--steps", type=_count, default=8, metavar="N", help="decode steps (default 8)")
    add("--hbm-gib", type=_count, default=2, metavar="N", help="HBM under --pressure (default 2)")
    add("--seed", type=int, default=0, metavar="N", help="of --pressure (default 0)")
    add("--chart", metavar="FILE", help="write HBM reads against exposed time (SVG)")
    add("--json", action="store_true", help="one JSON object on standard output")


def memory(options: argparse.Namespace) -> int:
    """Run what the flags ask for; return the exit code.

    Raises: `BadRequest` for a file that is not what it should be, `StartupFailed` for one that
    cannot be written.
    """
    record: dict[str, Any] = {}
    rows: list[Row] = []
    if not (options.pressure or options.accesses):
        record["exact"] = _exact(is_quiet=options.json)
    if not options.exact:
        rows = _studies(options)
    if options.chart:
        _write_chart(Path(options.chart), rows)
    if options.json:
        from penstock.sim.memory_study import figures_of

        record["runs"] = [figures_of(row) for row in rows]
        print(json.dumps(record))
    return 0


def _studies(options: argparse.Namespace) -> "list[Row]":
    from penstock.sim.accesses import published, read_accesses
    from penstock.sim.memory_study import liberties, sweeps

    if options.accesses:
        accesses = read_accesses(Path(options.accesses), mass=options.mass)
        plans = [("recorded", name, setup) for name, setup in liberties()]
    elif options.pressure:
        return _pressure(options)
    else:
        accesses = published()
        plans = [("liberties", name, setup) for name, setup in liberties()]
        if options.sweep:
            plans += sweeps()
    rows = list(_run(plans, accesses))
    if not options.json:
        _print_rows(accesses, rows)
        if not options.accesses:
            _print_verdict(rows)
    return rows


def _pressure(options: argparse.Namespace) -> "list[Row]":
    from penstock.core.types import GIB
    from penstock.sim.accesses import half_and_half, read_heads, tenants
    from penstock.sim.kvflow import BLOCK_TOKENS, TIERS
    from penstock.sim.memory_study import pressure

    heads = read_heads(Path(options.heads)) if options.heads else half_and_half(options.layers)
    stride = max(1, len(heads) // options.layers)
    context_blocks = options.context // BLOCK_TOKENS
    if context_blocks < 8:
        raise BadRequest(f"--context {options.context} is too short: 1024 tokens at least")
    accesses = tenants(
        heads[::stride],
        num_tenants=options.tenants,
        context_blocks=context_blocks,
        num_steps=options.steps,
        seed=options.seed,
    )
    sram_bytes = TIERS["sram"].capacity_bytes
    setups = pressure(hbm_bytes=options.hbm_gib * GIB, staging_bytes=sram_bytes)
    rows = list(_run([("pressure", name, setup) for name, setup in setups], accesses))
    if not options.json:
        size_gib = len(accesses.blocks) * accesses.block_bytes / GIB
        print(f"{size_gib:.1f} GiB of KV in {options.hbm_gib} GiB of HBM; patterns are made up")
        print("from published statistics, since real decode traces are not published.")
        _print_rows(accesses, rows)
    return rows


def _run(plans: "Iterable[tuple[str, str, Any]]", accesses: "Accesses") -> "Iterable[Row]":
    from penstock.sim.memory_study import run_pair

    plans = list(plans)
    for index, (study, setting, setup) in enumerate(plans, 1):
        print(
            f"penstock sim: {index} of {len(plans)}: {study}, {setting}",
            file=sys.stderr,
            flush=True,
        )
        yield from run_pair(study, setting, setup, accesses)


def _exact(*, is_quiet: bool) -> dict[str, dict[str, float]]:
    """Run KVFlow's experiment in all its variants; print and return the table."""
    from penstock.sim.kvflow import PublishedRun, published_runs

    table: dict[str, dict[str, float]] = {}
    for name, spec in published_runs():
        figures = PublishedRun(spec).run()
        table[name] = {
            "hbm_bytes": figures.hbm_bytes,
            "cxl_bytes": figures.read_bytes["cxl"],
            "dram_bytes": figures.read_bytes["dram"],
            "hit_rate": round(figures.hit_rate, 4),
            "exposed_ns": round(figures.exposed_ns, 2),
            "decompression_ns": round(figures.decompression_ns, 2),
            "total_ns": round(figures.total_ns, 2),
        }
    if not is_quiet:
        print("KVFlow's experiment in its own accounting (charged: moves and prefetches cost)")
        print(f"  {'':<34}{'HBM bytes':>15}{'SRAM hits':>11}{'exposed ns':>17}{'total ns':>17}")
        for name, row in table.items():
            print(
                f"  {name:<34}{row['hbm_bytes']:>15,}{row['hit_rate']:>11.4f}"
                f"{row['exposed_ns']:>17,.2f}{row['total_ns']:>17,.2f}"
            )
    return table


def _print_rows(accesses: "Accesses", rows: "list[Row]") -> None:
    print(f"\nHonest accounting: {accesses.name}, {accesses.num_accesses:,} reads")
    for key, value in accesses.details.items():
        print(f"  {key}: {value}")
    print(f"  {'':<42}{'':<10}{'HBM MB':>9}{'other MB':>10}{'exposed ms':>12}{'total ms':>10}")
    for row in rows:
        f = row.figures
        below = sum(size for tier, size in f.read_bytes.items() if tier.value in ("cxl", "dram"))
        # The baseline always comes first: name the setting once.
        name = _label(row) if row.policy == "baseline" else ""
        print(
            f"  {name:<42}{row.policy:<10}{f.hbm_bytes / 1e6:>9.1f}{below / 1e6:>10.1f}"
            f"{f.exposed_ns / 1e6:>12.3f}{f.total_ns / 1e6:>10.3f}"
        )


def _label(row: "Row") -> str:
    """Name a setting; those of a study's one list need not say which study it is."""
    is_list = row.study in ("liberties", "pressure", "recorded")
    return row.setting if is_list else f"{row.study}: {row.setting}"


def _print_verdict(rows: "list[Row]") -> None:
    """Say whether the target is met, and where nothing is left to win."""
    from penstock.sim.memory_study import HBM_BYTES_MAX, judge

    verdict = judge(rows)
    print(
        f"\n  ours, by cost and in HBM alone: {verdict.hbm_bytes:,} bytes read from HBM"
        f" (KVFlow {HBM_BYTES_MAX:,}), {verdict.exposed_ns:,} ns exposed"
    )
    print(
        f"  the baseline with the same: {verdict.baseline_ns:,} ns; with its best: "
        f"{verdict.best_baseline_ns:,} ns on the same links"
    )
    print(f"  both at once: {'met' if verdict.is_met else 'missed'}")


def _write_chart(path: Path, rows: "list[Row]") -> None:
    from penstock.sim.memory_study import frontier_rows
    from penstock.sim.scatter import Point, scatter

    frontier = {id(row) for row in frontier_rows(rows)}
    points = [
        Point(
            f"{row.policy}{', frontier' if id(row) in frontier else ''}",
            row.figures.hbm_bytes / 1e6,
            row.figures.exposed_ns / 1e6,
            f"{row.policy}, {row.study}: {row.setting}",
        )
        for row in rows
    ]
    text = scatter(points, "Bytes read from HBM and exposed time", "HBM, MB", "exposed, ms")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StartupFailed(f"--chart {path}: {error}") from error


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0, 1 at most")
    return share


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)
