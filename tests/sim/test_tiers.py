"""Tiers under the production worker core: seeded runs with faults, every token checked."""

import random
from dataclasses import replace

import pytest

from penstock.core.block import accepts_loss
from penstock.core.config import ControllerConfig
from penstock.core.request import Request, SamplingParams
from penstock.core.tiers import TierLoad
from penstock.core.types import NS_PER_MS, NS_PER_S, BlockHash, RequestId, Role
from penstock.sim.executor import VOCAB_SIZE, StepCost, chain_layout, expected_tokens
from penstock.sim.network import LinkCost
from penstock.sim.run import ClusterSpec, SimCluster, SimWorker
from penstock.sim.tiers import SimTier
from penstock.worker.fetches import Fetches

BLOCK_SIZE = 16
(BLOCK_BYTES,) = chain_layout(BLOCK_SIZE).block_bytes
FAULTS: list[dict[str, float]] = [
    {},
    {"write_failure": 0.3},
    {"read_failure": 0.3},
    {"corruption": 0.3},
    {"write_failure": 0.1, "read_failure": 0.1, "corruption": 0.1},
]
LINK_FAULTS: list[dict[str, float]] = [{}, {"loss": 0.05}, {"duplication": 0.1, "lateness": 0.1}]
DRAM = SimTier(name="dram", num_slots=24)
DISK = SimTier(name="disk", num_slots=64, latency_ns=80_000, bytes_per_s=500_000_000)


def conversations(rng: random.Random, count: int, turns: int) -> list[tuple[Request, int]]:
    """Sessions whose every turn begins with all that was said before, answers included."""
    requests = []
    for session in range(count):
        prompt: tuple[int, ...] = ()
        at_ns = rng.randint(0, 50) * NS_PER_MS
        for turn in range(turns):
            prompt += tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(10, 60)))
            request = Request(
                request_id=RequestId(f"s{session}t{turn}"),
                prompt_token_ids=prompt,
                params=SamplingParams(max_tokens=rng.randint(2, 20), ignore_eos=True),
                accepts_loss=session % 2 == 0,
            )
            requests.append((request, at_ns))
            prompt += tuple(expected_tokens(request, request.params.max_tokens, ()))
            at_ns += rng.randint(300, 900) * NS_PER_MS
    return requests


def run(spec: ClusterSpec, seed: int, *, kills: int = 0, sessions: int = 8) -> SimCluster:
    """Run; every client must have got the right tokens, or been told that its worker was lost."""
    rng = random.Random(seed)
    cluster = SimCluster(spec, seed)
    requests = conversations(rng, sessions, 4)
    for request, at_ns in requests:
        cluster.submit(request, at_ns)
        if kills and rng.random() < 0.1:
            cluster.cancel(request.request_id, at_ns + rng.randint(0, 5) * NS_PER_MS)
    for _ in range(kills):
        cluster.kill(rng.choice(list(spec.roles)), rng.randint(200, 2500) * NS_PER_MS)
    cluster.run()
    for request, _ in requests:
        outcome = cluster.outcomes[request.request_id]
        expected = expected_tokens(request, request.params.max_tokens, ())
        is_whole = outcome.error is None and not cluster.is_unwanted(request.request_id)
        assert is_whole or kills, outcome.error
        wanted = expected if is_whole else expected[: len(outcome.token_ids)]
        assert outcome.token_ids == wanted, cluster.story(request.request_id)
    for name, worker in cluster.workers.items():
        assert worker.core.is_idle, (seed, name)
    return cluster


def make_spec(*tiers: SimTier, roles: dict[str, Role] | None = None) -> ClusterSpec:
    return ClusterSpec(
        roles=roles or {"p0": Role.PREFILL, "d0": Role.DECODE},
        layout=chain_layout(BLOCK_SIZE),
        num_blocks=(32,),
        max_num_seqs=4,
        step_cost=StepCost(base_ns=2_000_000),
        tiers=tiers,
    )


def loads(cluster: SimCluster) -> dict[str, list[TierLoad]]:
    found: dict[str, list[TierLoad]] = {}
    for worker in cluster.workers.values():
        for load in worker.core.load().tiers:
            found.setdefault(load.name, []).append(load)
    return found


@pytest.mark.parametrize("seed", range(60))
def test_tokens_are_right_and_bytes_conserved_whatever_a_tier_does(seed: int) -> None:
    rng = random.Random(seed)
    faults = rng.choice(FAULTS)
    tiers = rng.choice([(DRAM,), (DISK,), (DRAM, DISK), (replace(DRAM, num_slots=3), DISK)])
    roles = rng.choice([{"p0": Role.PREFILL, "d0": Role.DECODE}, {"m0": Role.MIXED}])
    spec = make_spec(*(replace(tier, **faults) for tier in tiers), roles=roles)
    run(spec, seed, kills=rng.choice([0, 0, 2]))


@pytest.mark.parametrize("seed", range(20))
def test_tokens_are_right_where_the_end_comes_while_the_front_is_computed(seed: int) -> None:
    rng = random.Random(seed)
    slow = replace(DISK, num_slots=400, bytes_per_s=BLOCK_BYTES * 2000, **rng.choice(FAULTS))
    roles = rng.choice([{"p0": Role.PREFILL, "d0": Role.DECODE}, {"m0": Role.MIXED}])
    run(make_spec(slow, roles=roles), seed, kills=rng.choice([0, 0, 2]))


def test_out_of_a_slow_tier_prefixes_are_really_brought_beside_computing(monkeypatch) -> None:
    starts = []
    begin = Fetches.begin

    def noted(self, need, part, *more):
        starts.append(part.start)
        return begin(self, need, part, *more)

    monkeypatch.setattr(Fetches, "begin", noted)
    slow = replace(DISK, num_slots=400, bytes_per_s=BLOCK_BYTES * 2000)
    cluster = run(make_spec(slow, roles={"m0": Role.MIXED}), 1)
    assert sum(start > 0 for start in starts) > 3
    assert sum(load.num_hits for load in loads(cluster)["disk"]) > 0


def test_returning_conversations_hit_dram_and_what_sank_from_there_to_disk() -> None:
    # Larger than the pool, of which it has a copy, and smaller than all conversations.
    found = loads(run(make_spec(replace(DRAM, num_slots=56), DISK), 1))
    assert sum(load.num_hits for load in found["dram"]) > 0
    assert sum(load.num_hits for load in found["disk"]) > 0
    for load in [*found["dram"], *found["disk"]]:
        assert load.num_used <= load.num_slots
        assert not load.num_corrupt + load.num_failed
    # What was answered is in the decode worker's share, and found there.
    assert all(load.bytes_in > 0 for load in found["dram"])
    assert sum(load.num_shared for load in found["dram"]) > 0


def test_the_same_prompts_are_computed_where_there_is_no_tier() -> None:
    with_tiers = run(make_spec(replace(DRAM, num_slots=400)), 1)
    without = run(make_spec(), 1)
    hits = [c.workers["p0"].core.scheduler.prefix_hits for c in (with_tiers, without)]
    assert hits[0] > 1.2 * hits[1]
    assert loads(without) == {}


def test_flipped_bits_are_counted_and_dropped() -> None:
    found = loads(run(make_spec(replace(DRAM, num_slots=400, corruption=0.5)), 3))
    assert sum(load.num_corrupt for load in found["dram"]) > 0


def test_a_full_disk_is_left_alone_for_a_while() -> None:
    found = loads(run(make_spec(replace(DISK, write_failure=1.0)), 3))
    for load in found["disk"]:
        assert load.num_used == 0
        assert 0 < load.num_failed <= 64


def test_what_is_on_disk_is_found_by_the_next_incarnation() -> None:
    cluster = SimCluster(make_spec(DISK, roles={"m0": Role.MIXED}), 1)
    prompt = tuple(range(100))
    for number, at_ns in enumerate([0, 3 * NS_PER_S]):
        request = Request(
            request_id=RequestId(f"r{number}"),
            prompt_token_ids=prompt,
            params=SamplingParams(max_tokens=4, ignore_eos=True),
        )
        cluster.submit(request, at_ns)
    cluster.kill("m0", NS_PER_S)
    cluster.run()
    assert (
        cluster.outcomes[RequestId("r0")].token_ids == cluster.outcomes[RequestId("r1")].token_ids
    )
    (load,) = cluster.workers["m0"].core.load().tiers
    assert load.num_hits == 100 // BLOCK_SIZE


def test_a_tier_that_is_slower_than_computing_is_not_waited_for() -> None:
    slow = replace(DRAM, num_slots=400, latency_ns=10 * NS_PER_S)
    cluster = run(make_spec(slow), 1)
    assert not sum(load.num_hits for load in loads(cluster)["dram"])


def shared(slots: int, seed: int = 1, link: LinkCost | None = None, **faults: float) -> SimCluster:
    """Run on two workers that are given requests in turn."""
    spec = make_spec(
        replace(DRAM, num_slots=slots, **faults), roles={"m0": Role.MIXED, "m1": Role.MIXED}
    )
    controller = ControllerConfig(policy="round_robin")
    spec = replace(spec, num_blocks=(24,), controller=controller, link_cost=link or LinkCost())
    return run(spec, seed)


def test_a_turn_on_another_worker_finds_what_was_said_and_answered_in_its_siblings_tier() -> None:
    cluster = shared(400)
    found = loads(cluster)["dram"]
    assert all(load.num_shared > 0 for load in found)
    # One copy a host: hardly anything is written where a sibling has it.
    names = [set(shelf_names(worker)) for worker in cluster.workers.values()]
    assert len(names[0] & names[1]) < 0.1 * len(names[0] | names[1])


def shelf_names(worker: SimWorker) -> list[BlockHash]:
    return [block.name for block in worker.core.tiers.contents("dram")]


def test_a_slot_that_was_reused_meanwhile_is_stale_and_never_served() -> None:
    # Few slots, and news of them comes late; every token is checked by `run`.
    slow = LinkCost(latency_ns=20 * NS_PER_MS)
    loads_of = [loads(shared(14, seed, slow))["dram"] for seed in range(4)]
    assert sum(load.num_stale for found in loads_of for load in found) > 0
    assert sum(load.num_corrupt for found in loads_of for load in found) == 0


def test_a_block_that_is_wrong_in_a_siblings_tier_is_dropped_by_its_owner() -> None:
    found = loads(shared(400, corruption=0.5))["dram"]
    assert sum(load.num_stale for load in found) > 0
    assert sum(load.num_corrupt for load in found) > 0


@pytest.mark.parametrize("seed", range(40))
def test_tokens_are_right_whatever_happens_to_siblings(seed: int) -> None:
    """Killed ones, lost and late messages, small tiers, flipped bits, unreadable and full ones."""
    rng = random.Random(seed)
    faults = rng.choice(FAULTS)
    dram = replace(DRAM, num_slots=rng.choice([6, 30, 200]), **faults)
    tiers = rng.choice([(dram,), (dram, replace(DISK, **faults))])
    mixed = {f"m{i}": Role.MIXED for i in range(2)}
    split = {"p0": Role.PREFILL, "p1": Role.PREFILL, "d0": Role.DECODE}
    link = LinkCost(jitter_ns=400_000, **rng.choice(LINK_FAULTS))
    spec = replace(
        make_spec(*tiers, roles=rng.choice([mixed, split])),
        link_cost=link,
        controller=ControllerConfig(policy="round_robin"),
    )
    run(spec, seed, kills=rng.choice([0, 2, 4]))


@pytest.mark.parametrize("seed", range(6))
def test_lossy_slots_hold_what_accepts_a_loss_alone_and_are_checked_before_they_are_decoded(
    seed: int,
) -> None:
    faults = FAULTS[seed % len(FAULTS)]
    near = replace(DRAM, is_lossy=True, **faults)
    far = replace(DISK, is_lossy=seed % 2 == 0, **faults)
    cluster = run(make_spec(near, far), seed, kills=seed % 3)
    for worker in cluster.workers.values():
        for tier in (near, far):
            names = [name for name, _ in worker.slots[tier.name].records.values()]
            if tier.is_lossy:
                assert all(map(accepts_loss, names))
    if not faults and not seed % 3:
        assert sum(load.num_hits for found in loads(cluster).values() for load in found) > 0
