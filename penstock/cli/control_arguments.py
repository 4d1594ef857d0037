"""What may be said of scheduling: which rule, which promises, and whether roles may change.

Also turns it into the controller's settings. Called by `penstock serve`.
"""

import argparse
from argparse import Namespace
from typing import TYPE_CHECKING, Final

from penstock.cli.values import milliseconds
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


def controller_config(options: Namespace) -> ControllerConfig:
    """Return what the options ask of the controller."""
    return ControllerConfig(
        policy=options.policy,
        slo_ttft_ms=options.slo_ttft_ms,
        slo_tpot_ms=options.slo_tpot_ms,
        is_switching_roles=options.role_switching,
    )
