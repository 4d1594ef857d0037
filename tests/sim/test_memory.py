"""The memory machine: times worked out by hand, and books that add up for any workload."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kv.orchestrator import Orchestrator, OrchestratorConfig
from penstock.kv.tiers import RAW, CodecSpec, LinkSpec, Tier, TierSpec
from penstock.sim.memory import LinearPlaces, MemoryFigures, MemoryMachine, Timing

BLOCK = 100
CODECS = (
    CodecSpec(name=RAW, block_bytes=BLOCK),
    CodecSpec(name="int8", block_bytes=BLOCK // 2, encode_ns=20, decode_ns=20, loss=0.001),
)


def run(
    steps: list[list[int]],
    *,
    codec: str = RAW,
    num_queues: int = 1,
    staging: int = 100,
    lookahead: int = 0,
    descriptor_bytes_max: int = 1 << 20,
    timing: tuple[int, int, int] = (10, 0, 0),
) -> MemoryFigures:
    """Run over one tier that takes 30 ns and a byte per ns."""
    link = LinkSpec(
        source=Tier.HBM,
        destination=Tier.STAGING,
        latency_ns=30,
        bytes_per_ns=1,
        num_queues=num_queues,
    )
    config = OrchestratorConfig(
        tiers=(
            TierSpec(tier=Tier.STAGING, capacity_bytes=staging * BLOCK),
            TierSpec(tier=Tier.HBM, capacity_bytes=1 << 30),
        ),
        links=(link,),
        codecs=CODECS,
        target=Tier.STAGING,
        descriptor_bytes_max=descriptor_bytes_max,
    )
    orchestrator = Orchestrator(config, LinearPlaces())
    for key in {key for step in steps for key in step}:
        assert orchestrator.store(key, Tier.HBM, codec)
    compute_ns, stage_ns, read_ns = timing
    machine = MemoryMachine(
        orchestrator,
        Timing(
            compute_ns=compute_ns, stage_ns=stage_ns, read_ns=read_ns, lookahead_units=lookahead
        ),
    )
    figures = machine.run(steps, steps)
    orchestrator.check()
    return figures


def test_one_block_takes_latency_and_bytes_and_is_then_a_hit():
    figures = run([[1], [1]])
    assert figures.exposed_ns == 130
    assert figures.total_ns == 130 + 2 * 10
    assert figures.hbm_bytes == BLOCK
    assert figures.num_hits == 1


def test_storing_and_reading_in_staging_take_time_too():
    assert run([[1]], timing=(10, 4, 5)).exposed_ns == 130 + 9


def test_neighbours_pay_the_latency_once_and_strangers_each():
    assert run([[1, 2, 3]]).exposed_ns == 330 - 0
    assert run([[1, 5, 9]]).exposed_ns == 3 * 130 - 2 * 10
    assert run([[1, 2, 3]], descriptor_bytes_max=1).exposed_ns == 3 * 130 - 2 * 10


def test_queues_overlap_latencies_and_not_bytes():
    assert run([[1, 5, 9]], num_queues=3).exposed_ns == 30 + 300 - 2 * 10


def test_decoding_runs_beside_the_next_transfer_and_what_remains_is_exposed():
    figures = run([[1, 5]], codec="int8")
    # Block 1 has crossed at 80 and is decoded at 100; 5 has crossed at 160, is decoded at 180.
    assert figures.exposed_ns == 100 + (180 - 110)
    assert figures.exposed_decode_ns == 20 + 20
    assert figures.hbm_bytes == BLOCK


def test_knowing_the_next_step_hides_its_reads():
    # Block 7 is known at 0 and read from 130 on, while 1 computes.
    assert run([[1], [7]], timing=(100, 0, 0)).exposed_ns == 260
    figures = run([[1], [7]], lookahead=1, timing=(100, 0, 0))
    assert figures.exposed_ns == 130 + 30
    assert figures.prefetch.late == 1


def test_what_staging_cannot_keep_is_read_again():
    steps = [[1], [3], [1], [3]]
    assert run(steps, staging=1).hbm_bytes == 4 * BLOCK
    assert run(steps, staging=2).hbm_bytes == 2 * BLOCK


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=6), min_size=1, max_size=10),
    st.sampled_from([RAW, "int8"]),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(12, 30),
)
def test_time_adds_up_and_every_miss_is_read_once(steps, codec, num_queues, lookahead, staging):
    figures = run(steps, codec=codec, num_queues=num_queues, lookahead=lookahead, staging=staging)
    assert figures.num_accesses == sum(map(len, steps))
    assert figures.total_ns == figures.compute_ns + figures.exposed_ns
    size = BLOCK if codec == RAW else BLOCK // 2
    assert figures.hbm_bytes == size * figures.num_transfers
    assert figures.num_decoded == (0 if codec == RAW else figures.num_transfers)
    assert figures.hbm_bytes >= size * len({key for step in steps for key in step})
    # No link is faster than its bytes.
    assert figures.total_ns >= figures.hbm_bytes


def test_a_fetch_that_takes_longer_than_computing_is_pure_waiting():
    assert run([[1], [2]]).exposed_ns == pytest.approx(260)
