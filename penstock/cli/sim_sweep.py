"""`penstock sim sweep`: which static split of the workers is best, and how few carry the load."""

import argparse
import sys

import msgspec

from penstock.cli.sim import slo_of, spec_of, workload_of
from penstock.cli.sim_progress import Progress
from penstock.cli.sim_tables import print_fewest, print_splits
from penstock.core.errors import BadRequest
from penstock.core.types import NS_PER_S
from penstock.sim.choose import make_workload
from penstock.sim.fleet import Member, Pool, describe_fleet, parse_fleet, pools_of
from penstock.sim.observe import Observation
from penstock.sim.serve import ModelledCluster
from penstock.sim.sweep import Sweep, Tried, best_at_scale

_LIMITS_AFTER_LAST = 10.0
"""A run ends so many TTFT limits (and a minute) after the last arrival: who is not answered then
would not have been answered in time.
"""


def sweep(options: argparse.Namespace) -> int:
    """Search and tell; return the exit code. Raises: `BadRequest` for what cannot be searched."""
    arrivals = make_workload(workload_of(options))
    last_s = arrivals[-1].at_ns / NS_PER_S
    limit_s = last_s + 60 + _LIMITS_AFTER_LAST * options.slo_ttft_ms / 1000

    def simulate(members: tuple[Member, ...]) -> Observation:
        cluster = describe_fleet(members)
        with Progress(last_s, cluster) as progress:
            spec = spec_of(options, cluster)
            return ModelledCluster(spec, arrivals).run(limit_s=limit_s, progress=progress.advance)

    search = Sweep(simulate, slo_of(options), options.slo_scales)
    pools = pools_of(parse_fleet(options.cluster, options.model))
    if options.fewest is None:
        _tell_splits(options, search.best_split(pools))
        return 0
    if len(pools) != 1:
        raise BadRequest("--fewest is for one kind of worker: --cluster H100, for example")
    return _tell_fewest(options, search, Pool(pools[0].hardware, options.fewest))


def _tell_fewest(options: argparse.Namespace, search: Sweep, pool: Pool) -> int:
    fewest = search.fewest(pool, options.target)
    at_scale = {
        scale: search.fewest(pool, options.target, i) for i, scale in enumerate(options.slo_scales)
    }
    sizes = sorted(search.sizes.items())
    if options.json:
        _write(
            {
                "fewest": fewest,
                "fewest_at_slo_scale": {f"{scale:g}": n for scale, n in at_scale.items()},
                "target": options.target,
                "sizes": [{"workers": n, **msgspec.to_builtins(tried[0])} for n, tried in sizes],
            }
        )
    else:
        print_fewest(search, fewest, at_scale, options.target)
    return 0 if fewest is not None else 1


def _tell_splits(options: argparse.Namespace, tried: list[Tried]) -> None:
    if options.json:
        best_at = {
            f"{scale:g}": best_at_scale(tried, i).cluster
            for i, scale in enumerate(options.slo_scales)
        }
        splits = msgspec.to_builtins(tried)
        _write({"best": tried[0].cluster, "best_at_slo_scale": best_at, "splits": splits})
    else:
        print_splits(tried, options.slo_scales, slo_of(options))


def _write(record: dict[str, object]) -> None:
    sys.stdout.write(msgspec.json.encode(record).decode() + "\n")
