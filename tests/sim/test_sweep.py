"""The search over splits and sizes, with clusters whose worth is a formula, and with real ones."""

import pytest

from penstock.core.types import NS_PER_S, Role
from penstock.sim.choose import WorkloadSpec, make_workload
from penstock.sim.fleet import Member, Pool, parse_fleet, pools_of
from penstock.sim.observe import Observation, Sample, Served
from penstock.sim.serve import ModelledCluster, ServeSpec
from penstock.sim.summary import Slo
from penstock.sim.sweep import Sweep, best_at_scale

MODEL = "llama3.1-8b"


def formula(wanted: int, runs: list[int]):
    """Make runs in which TTFT grows with the distance from `wanted` prefill workers."""

    def simulate(members: tuple[Member, ...]) -> Observation:
        prefill = sum(m.role is Role.PREFILL for m in members)
        runs.append(prefill)
        distance = 50 if members[0].role is Role.MIXED else abs(prefill - wanted)
        served = [
            Served(0, 1, 1, first_token_ns=(1 + i * distance) * NS_PER_S // 100, finished_ns=1)
            for i in range(100)
        ]
        for one in served:
            one.finished_ns, one.num_tokens = one.first_token_ns, 1
        return Observation(served=served, samples=[Sample(0, 0, 0, {}, {})])

    return simulate


@pytest.mark.parametrize(("workers", "wanted"), [(4, 1), (8, 5), (64, 41), (64, 2)])
def test_the_best_split_is_found_with_few_runs(workers: int, wanted: int) -> None:
    runs: list[int] = []
    pools = pools_of(parse_fleet(f"{workers}xH100", MODEL))
    tried = Sweep(formula(wanted, runs), Slo(ttft_ms=100)).best_split(pools)
    assert tried[0].cluster == f"{wanted}xH100-tp1:prefill,{workers - wanted}xH100-tp1:decode"
    assert len(runs) == len(tried) <= 32
    assert sum(":mixed" in t.cluster for t in tried) == 1


def test_kinds_of_hardware_are_split_each() -> None:
    def simulate(members: tuple[Member, ...]) -> Observation:
        return formula(
            2
            if all((m.hardware.gpu == "L20") == (m.role is Role.PREFILL) for m in members)
            else 90,
            [],
        )(members)

    pools = pools_of(parse_fleet("2xL20,2xH20", MODEL))
    tried = Sweep(simulate, Slo(ttft_ms=100)).best_split(pools)
    assert tried[0].cluster == "2xL20-tp1:prefill,2xH20-tp1:decode"
    assert len(tried) == 8  # nine, less none that prefills and none that decodes, and all mixed


def test_other_limits_are_told_from_the_same_runs() -> None:
    search = Sweep(formula(2, []), Slo(ttft_ms=10), scales=(1.0, 1000.0))
    tried = search.best_split((Pool(parse_fleet("H100", MODEL)[0].hardware, 4),))
    assert best_at_scale(tried, 0).cluster == tried[0].cluster
    assert {t.attainment_at[1] for t in tried if "mixed" not in t.cluster} == {1.0}


def test_fewer_workers_carry_less_and_the_fewest_that_carry_it_are_found() -> None:
    arrivals = make_workload(
        WorkloadSpec(source="fixed:in=4000,out=100", rate=20.0, duration_s=6.0)
    )

    def simulate(members: tuple[Member, ...]) -> Observation:
        return ModelledCluster(ServeSpec(members=members), arrivals).run(limit_s=20.0)

    search = Sweep(simulate, Slo(ttft_ms=500, tpot_ms=20))
    fewest = search.fewest(Pool(parse_fleet("H100", MODEL)[0].hardware, 8), target=0.95)
    assert fewest is not None
    assert 1 < fewest < 8
    shares = {n: tried[0].summary.slo_attainment for n, tried in search.sizes.items()}
    assert shares[fewest] >= 0.95
    assert shares[fewest - 1] < 0.95
    assert Sweep(simulate, search.slo).fewest(pools_of(parse_fleet("L20", MODEL))[0], 0.95) is None


def test_how_few_is_told_for_other_limits_from_the_same_runs() -> None:
    """TTFT is a hundredth of a limit for each worker that is missing to ten."""
    runs: list[int] = []

    def simulate(members: tuple[Member, ...]) -> Observation:
        runs.append(len(members))
        ttft_ns = (10 - len(members)) * NS_PER_S // 100 + 1
        served = [Served(0, 1, 1, first_token_ns=ttft_ns, finished_ns=ttft_ns, num_tokens=1)]
        return Observation(served=served, samples=[Sample(0, 0, 0, {}, {})])

    search = Sweep(simulate, Slo(ttft_ms=40.1), scales=(0.5, 1.0, 2.0))
    pool = Pool(parse_fleet("H100", MODEL)[0].hardware, 8)
    assert search.fewest(pool, 0.9) == 6
    num_runs = len(runs)
    assert search.fewest(pool, 0.9, 1) == 6
    assert len(runs) == num_runs
    assert (search.fewest(pool, 0.9, 0), search.fewest(pool, 0.9, 2)) == (8, 2)
    assert search.fewest(Pool(pool.hardware, 7), 0.9, 0) is None
