"""Workers that keep their KV in blocks of different sizes: every token is right all the same."""

import random

import msgspec
import pytest
from msgspec.structs import replace

from penstock.core.config import Handoff
from penstock.core.events import Move
from penstock.core.types import NS_PER_MS, Role
from penstock.sim.executor import chain_layout
from penstock.sim.network import LinkCost
from penstock.sim.run import ClusterSpec, SimCluster
from penstock.transfer.digest import take_digests
from tests.sim.test_run import EOS, check_outcome, make_requests

PAIRS = [(16, 32), (64, 16), (8, 128), (32, 32)]
WINDOWS = [(0,), (0, 40), (0, 32, 7)]
FAULTS = {"loss": 0.05, "duplication": 0.1, "move_failure": 0.1, "corruption": 0.15}


def make_spec(seed, sizes, windows, faults):
    rng = random.Random(seed)
    theirs, ours = (chain_layout(size, windows) for size in sizes)
    if sizes[0] == sizes[1]:
        ours = replace(ours, total_kv_heads=1)  # the same in other words: copied as it is
    return ClusterSpec(
        roles={"p0": Role.PREFILL, "p1": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE},
        layout=theirs,
        # A pair of the same shape beside those of different ones.
        layouts={"d0": ours, "d1": rng.choice([ours, theirs])},
        num_blocks=tuple(rng.randint(20, 40) * 16 // min(sizes) for _ in windows),
        max_num_seqs=rng.randint(2, 8),
        max_num_batched_tokens=rng.choice([16, 50, 128]),
        max_model_len=200,
        eos_token_ids=(EOS,),
        handoff=rng.choice([*Handoff, Handoff.STREAM]),
        link_cost=LinkCost(bytes_per_s=rng.choice([100_000, 10_000_000_000]), **faults),
    )


def run(seed, sizes, windows, faults):
    rng = random.Random(seed)
    cluster = SimCluster(make_spec(seed, sizes, windows, faults), seed)
    requests = make_requests(rng, 12)
    for request in requests:
        at_ns = rng.randint(0, 200) * NS_PER_MS
        cluster.submit(request, at_ns)
        if faults and rng.random() < 0.15:
            cluster.cancel(request.request_id, at_ns + rng.randint(0, 100) * NS_PER_MS)
    if faults:
        cluster.kill(rng.choice(["p0", "d0"]), rng.randint(5, 200) * NS_PER_MS)
    cluster.run()
    for request in requests:
        check_outcome(cluster, request)
    for worker in cluster.workers.values():
        assert worker.core.is_idle
    return cluster


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("sizes", PAIRS)
@pytest.mark.parametrize("faults", [{}, FAULTS], ids=["well", "faults"])
def test_hand_offs_between_block_sizes(sizes, windows, faults):
    for seed in range(2):
        cluster = run(seed, sizes, windows, faults)
        if faults:
            continue
        moves = moves_of(cluster)
        assert any(move.reshapes for move in moves)
        loads = [worker.core.load() for worker in cluster.workers.values()]
        assert not sum(load.pulls_recomputed + load.pulls_corrupt for load in loads)


def moves_of(cluster):
    entries = [entry for worker in cluster.workers.values() for entry in worker.log]
    commands = [command for entry in entries for command in entry.commands]
    return [msgspec.convert(c["move"], Move) for c in commands if c["type"] == "SubmitMove"]


def test_prefixes_that_are_here_already_are_not_pulled_again():
    begins = [
        move.reshapes[0].begin
        for seed in range(3)
        for move in moves_of(run(seed, (16, 32), (0,), {}))
        if move.reshapes
    ]
    assert any(begin > 0 for begin in begins)


def test_blocks_that_came_reshaped_are_offered_on_with_digests():
    num_digests = 0
    for seed in range(3):
        cluster = run(seed, (16, 32), (0,), {})
        for name in ("d0", "d1"):
            pool = cluster.workers[name].core.kv.groups[0].pool
            memory = cluster.workers[name].pools[0]
            named = [b for b in range(pool.num_blocks) if pool.prefix_cache.is_indexed(b)]
            num_digests += len(named)
            assert tuple(map(pool.digest, named)) == take_digests(memory, named)
    assert num_digests > 20


def test_flipped_bits_are_found():
    loads = [
        worker.core.load()
        for seed in range(3)
        for worker in run(seed, (16, 32), (0,), {"corruption": 0.5}).workers.values()
    ]
    assert sum(load.pulls_corrupt for load in loads) > 5
    assert sum(load.pulls_recomputed for load in loads) > 0
