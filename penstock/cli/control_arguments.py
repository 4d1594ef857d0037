"""What may be said of scheduling: which rule, which promises, and whether roles may change.

Also turns it into the controller's settings. Called by `penstock serve`.
"""

import argparse
from argparse import Namespace
from typing import TYPE_CHECKING, Final

from penstock.cli.values import milliseconds, positive, seconds
from penstock.core.config import ControllerConfig

if TYPE_CHECKING:
    Group = argparse._ArgumentGroup

POLICIES: Final = (
    "predicted",
    "round_robin",
    "least_loaded",
    "prefix_aware",
    "power_of_two",
    "arrow",
)
"""Those of `penstock/control/policies/`, which is not imported here: parsing must be quick."""


def add_scheduling(group: "Group") -> None:
    """Add how requests are given to workers."""
    add = group.add_argument
    add(
        "--policy",
        choices=POLICIES,
        default=POLICIES[0],
        help="who gets a request (default: %(default)s, least predicted time to first token; the "
        "others are there to compare with)",
    )
    add(
        "--slo-ttft-ms",
        type=milliseconds,
        metavar="MS",
        help="longest time to first token: who would have to wait longer is refused at once with "
        "429 and when to come back (default: nobody is; a request may say x-slo-ttft-ms)",
    )
    add(
        "--slo-tpot-ms",
        type=milliseconds,
        metavar="MS",
        help="longest time per token after the first: workers are not filled beyond it (default: "
        "no bound; a request may say x-slo-tpot-ms)",
    )
    add(
        "--role-switching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let workers change between prefill and decode as the load asks for; the last one of "
        "a role never does, nor one that POST /pd_role_switch has pinned (default: they may)",
    )
    add(
        "--min-workers",
        type=positive,
        metavar="N",
        help="retire workers of this host that have had little to do for a while (--retire-after), "
        "down to N (default: as many as it begins with)",
    )
    add(
        "--max-workers",
        type=positive,
        metavar="N",
        help="start more workers of this host while the load is too much for those that are there, "
        "up to N; cores and KV cache memory are shared out among so many (default: as many as it "
        "begins with)",
    )
    add(
        "--retire-after",
        type=seconds,
        default=30.0,
        metavar="S",
        help="how long the others must have had room for the work of a worker (default: 30)",
    )


def controller_config(options: Namespace, num_workers: int) -> ControllerConfig:
    """Return what the options ask of the controller of a cluster that begins with so many."""
    least, most = options.min_workers, options.max_workers
    is_elastic = bool(least or most)
    return ControllerConfig(
        policy=options.policy,
        slo_ttft_ms=options.slo_ttft_ms,
        slo_tpot_ms=options.slo_tpot_ms,
        is_switching_roles=options.role_switching,
        workers_min=least or num_workers if is_elastic else 0,
        workers_max=most or max(num_workers, least or 0) if is_elastic else 0,
        retire_after_ms=options.retire_after * 1e3,
    )
