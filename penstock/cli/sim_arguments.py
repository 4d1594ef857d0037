"""What may be said to `penstock sim`. Parses and explains; `penstock/cli/sim.py` acts."""

import argparse
from typing import TYPE_CHECKING, Final

from penstock.cli.sim_memory import add_memory
from penstock.cli.sim_reuse import add_reuse

POLICIES: Final = (
    "predicted",
    "round_robin",
    "least_loaded",
    "prefix_aware",
    "power_of_two",
    "arrow",
)
"""The names of `penstock/control/policies/`, which would take numpy to import."""

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_SIM_DESCRIPTION = """\
Simulate a cluster: the very controller and workers that serve, over modelled GPUs and network.
Nothing is computed, so an hour of a cluster takes seconds, and no GPU is needed.
"""

_SERVE_EXAMPLES = """\
examples:
  penstock sim serve --workload chat --rate 4 --cluster 4xH100:prefill,4xH100:decode
  penstock sim serve --workload mooncake.jsonl.gz --model llama3.1-70b \\
      --cluster 8xH100-tp4:prefill,8xH100-tp4:decode --report run.html
  penstock sim serve --workload swing:period=300 --rate 6 --duration 900 --cluster 8xH100:mixed
  penstock sim serve --workload step --rate 2 --duration 600 --cluster H100:prefill,H100:decode \\
      --max-workers 6
  penstock sim serve --workload azure.csv --rate 20 --cluster 2xL20:prefill,2xH20:decode \\
      --fault kill:decode-0@60 --json

workloads: a file (Mooncake or Azure trace, ServeGen samples, tables of lengths, LongBench's table,
sessions of agents; told by its columns), or a rule with its numbers:
  fixed:in=1000,out=256,shared=0            lognormal:in=1000,out=256,sigma=0.8,shared=0
  chat:turns=5,in=600,out=250,think=20,system=500
  agents:turns=20,in=400,out=80,think=1,system=2000
  step:in=1500,out=300,sigma=0.8,at=120,factor=3            swing:period=600
  phases:phase=120,busier=1.8
clusters: COUNTxGPU[-tpN][:prefill|decode|mixed], with commas; GPUs A100 H100 H200 L40S H20 L20
faults: kill:WORKER@SECONDS, or slow:WORKER@SECONDSxFACTOR (slow:decode-0@30x2 takes twice as long)
"""

_SWEEP_EXAMPLES = """\
examples:
  penstock sim sweep --workload chat --rate 6 --cluster 8xH100
  penstock sim sweep --workload azure.csv --rate 30 --cluster 4xL20,4xH20 --requests 3000
  penstock sim sweep --workload chat --rate 12 --cluster H100 --fewest 64 --target 0.95 --json

The workers' roles are what is looked for, so the cluster is given without any. With --fewest N the
cluster is one kind of worker, and the answer is how many of it, up to N, carry the load.
"""


_REPLAY_EXAMPLES = """\
examples:
  penstock serve --decision-log run.log                  record a run, then
  penstock replay run.log                                simulate it as it was: how far off is it?
  penstock replay run.log --cluster 2xprefill,1xdecode   the same load on other workers
  penstock replay run.log --policy round_robin           the same workers, chosen by another rule
  penstock replay run.log --speed 1.5 --slo-ttft-ms 300  half as many requests again, other limits

Workers are like the recorded ones: step times, links and messages are taken from the log and those
of the workers beside it. What a simulation cannot know is what else the machine did.
"""


def add_replay(commands: "Commands") -> None:
    """Add `penstock replay`."""
    parser = commands.add_parser(
        "replay",
        help="simulate a recorded run with one thing changed",
        description="Simulate the run that a decision log recorded, with one thing changed.",
        epilog=_REPLAY_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("log", metavar="LOG", help="what `penstock serve --decision-log LOG` wrote")
    add("--cluster", metavar="SPEC", help="other workers: 2xprefill,1xdecode")
    add("--speed", type=_above_zero, default=1.0, metavar="X", help="requests come X times as fast")
    add("--slo-ttft-ms", type=_above_zero, default=2000.0, metavar="MS", help="default 2000")
    add("--slo-tpot-ms", type=_above_zero, default=50.0, metavar="MS", help="default 50")
    add(
        "--max-num-batched-tokens",
        type=_positive,
        metavar="N",
        help="tokens of a step (default: what the recorded workers were started with)",
    )
    add(
        "--policy",
        choices=POLICIES,
        metavar="NAME",
        help=f"another way to choose workers: {', '.join(POLICIES)}",
    )
    add(
        "--role-switching",
        action=argparse.BooleanOptionalAction,
        help="whether workers change sides as the load asks for (default: as recorded)",
    )
    add("--report", metavar="FILE", help="write a page with pictures of the simulated run (HTML)")
    add("--json", action="store_true", help="one JSON object on standard output")


def add_sim(commands: "Commands") -> None:
    """Add `penstock sim` and what it can do."""
    parser = commands.add_parser(
        "sim",
        help="simulate a cluster: no GPU needed",
        description=_SIM_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    acts = parser.add_subparsers(dest="act", required=True, metavar="ACT")
    add_memory(acts)
    add_reuse(acts)
    serve = _add_act(acts, "serve", "simulate one cluster under one load", _SERVE_EXAMPLES)
    serve.add_argument("--report", metavar="FILE", help="write a page with pictures (HTML)")
    serve.add_argument(
        "--min-workers",
        type=_positive,
        metavar="N",
        help="retire workers that have little to do, down to N (default: as many as --cluster has)",
    )
    serve.add_argument(
        "--max-workers",
        type=_positive,
        metavar="N",
        help="start workers while the load asks for them, up to N; each takes 10 s",
    )
    serve.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="FAULT",
        help="kill:NAME@SECONDS or slow:NAME@SECONDSxFACTOR; may be given again",
    )
    sweep = _add_act(
        acts, "sweep", "find the best static split, or the fewest GPUs", _SWEEP_EXAMPLES
    )
    sweep.add_argument(
        "--fewest",
        type=_positive,
        metavar="N",
        help="find how many workers carry the load, up to N",
    )
    sweep.add_argument(
        "--target",
        type=_share,
        default=0.9,
        metavar="SHARE",
        help="share of requests that must meet both limits (default 0.9)",
    )
    sweep.add_argument(
        "--slo-scales",
        type=_numbers,
        default=(0.5, 1.0, 2.0, 4.0),
        metavar="X,Y",
        help="also tell the best split for limits so many times as long (default 0.5,1,2,4)",
    )


def _add_act(acts: "Commands", name: str, help_text: str, examples: str) -> argparse.ArgumentParser:
    parser = acts.add_parser(
        name,
        help=help_text,
        description=f"{help_text[0].upper()}{help_text[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_load(parser.add_argument_group("load"))
    _add_cluster(parser.add_argument_group("cluster"))
    _add_policy(parser.add_argument_group("controller"), is_switching=name == "serve")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser


def _add_load(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--workload", required=True, metavar="FILE|RULE", help="what arrives; see below")
    add("--rate", type=_above_zero, metavar="R", help="requests (or sessions) per second")
    add("--duration", type=_above_zero, metavar="S", help="seconds in which requests arrive")
    add("--requests", type=_positive, metavar="N", help="no more requests than this")
    add(
        "--burstiness",
        type=_variation,
        default=1.0,
        metavar="CV",
        help="coefficient of variation of drawn gaps: 1 Poisson (default), above 1 bursts, 0 even",
    )
    add("--seed", type=int, default=0, metavar="N", help="of everything that is drawn (default 0)")
    add("--slo-ttft-ms", type=_above_zero, default=2000.0, metavar="MS", help="default 2000")
    add("--slo-tpot-ms", type=_above_zero, default=50.0, metavar="MS", help="default 50")


def _add_policy(group: argparse._ArgumentGroup, *, is_switching: bool) -> None:
    add = group.add_argument
    default = "they may, as in penstock serve" if is_switching else "they stay: splits are compared"
    add(
        "--policy",
        choices=POLICIES,
        default="predicted",
        metavar="NAME",
        help=f"how workers are chosen: {', '.join(POLICIES)} (default predicted)",
    )
    add(
        "--admission",
        action="store_true",
        help="refuse at once what would break the limits, instead of serving it late",
    )
    add(
        "--role-switching",
        action=argparse.BooleanOptionalAction,
        default=is_switching,
        help=f"let workers change sides as the load asks for (default: {default})",
    )
    add("--max-queued", type=_positive, default=100_000, metavar="N", help="default 100000")


def _add_cluster(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--cluster", required=True, metavar="SPEC", help="4xH100:prefill,4xH100:decode")
    add("--model", default="llama3.1-8b", metavar="M", help="llama3.1-8b (default), llama3.1-70b")
    add("--gpus-per-host", type=_positive, default=8, metavar="N", help="default 8")
    add(
        "--link-gbps",
        type=_above_zero,
        default=200.0,
        metavar="G",
        help="network card of a host, each way (default 200)",
    )
    add(
        "--inner-gbps",
        type=_above_zero,
        default=2400.0,
        metavar="G",
        help="between workers of one host, shared (default 2400)",
    )
    add("--link-us", type=_above_zero, default=20.0, metavar="US", help="latency (default 20)")
    add("--span-us", type=_above_zero, default=5.0, metavar="US", help="per span (default 5)")
    add("--block-size", type=_positive, default=128, metavar="N", help="tokens (default 128)")
    add("--max-num-seqs", type=_positive, default=256, metavar="N", help="default 256")
    add("--max-num-batched-tokens", type=_positive, default=8192, metavar="N", help="default 8192")
    add("--no-prefix-caching", action="store_true", help="compute every prompt in full")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _above_zero(text: str) -> float:
    number = _number(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above zero")
    return number


def _variation(text: str) -> float:
    number = _number(text)
    if not 0 <= number <= 20:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 20")
    return number


def _share(text: str) -> float:
    number = _number(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share between 0 and 1")
    return number


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(_above_zero, text.split(",")))


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not abs(number) < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return number
