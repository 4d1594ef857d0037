"""The published experiment, to the digit, and what its quirks are worth."""

import pytest

from penstock.sim.kvflow import (
    NUM_STEPS,
    SHRINK,
    PublishedFigures,
    PublishedRun,
    PublishedSpec,
    accesses,
    published_runs,
)


def run(**settings) -> PublishedFigures:
    return PublishedRun(PublishedSpec(**settings)).run()


def test_the_workload_is_the_published_one():
    blocks = [block for step in range(NUM_STEPS) for block in accesses(step)]
    assert len(blocks) == 20_288
    assert len(set(blocks)) == 16_960


def test_the_published_baseline_to_the_digit():
    figures = run(is_tiered=False)
    assert figures.hbm_bytes == 1_329_594_368
    assert figures.hit_rate == 0
    assert round(figures.exposed_ns, 2) == 5_936_655.36
    assert round(figures.total_ns, 2) == 9_588_495.36
    assert figures.decompression_ns == 0
    assert figures.moved_bytes == figures.num_prefetched == 0


def test_the_published_kvflow_to_the_digit():
    figures = run()
    assert figures.hbm_bytes == 708_837_376
    assert figures.read_bytes["cxl"] == 227_540_992
    assert figures.num_hits == 2_924
    assert round(figures.hit_rate, 4) == 0.1441
    assert round(figures.exposed_ns, 2) == 12_917_341.91
    assert figures.decompression_ns == 1_436_800
    assert round(figures.total_ns, 2) == 18_005_981.91
    assert figures.moved_bytes == 987_758_592
    assert figures.num_compressions == 5_696
    assert (figures.num_prefetched, figures.num_staged) == (2_664, 2_616)


def test_cold_blocks_kept_in_hbm_win_even_by_its_own_accounting():
    figures = run(cold_tier="hbm")
    assert figures.hbm_bytes == 936_378_368
    assert round(figures.exposed_ns) == 3_716_579
    assert round(figures.total_ns) == 8_805_219


def test_a_unit_read_the_other_way():
    assert round(run(is_tiered=False, unit="gbyte").exposed_ns) == 2_853_842
    assert round(run(unit="gbyte").exposed_ns) == 6_993_864


def test_charging_what_was_free_never_helps():
    free, charged = run(), run(charged=True)
    assert charged.exposed_ns > free.exposed_ns
    # Hits are no longer HBM reads, but what was prefetched and moved is.
    assert charged.hbm_bytes > free.hbm_bytes
    assert charged.read_bytes["dram"] > 0


def test_precision_is_lost_for_good():
    published = PublishedRun(PublishedSpec())
    published.run()
    worst = {}
    for block, codec in published.delivered:
        assert SHRINK[codec] >= worst.get(block, 1)
        worst[block] = SHRINK[codec]
    assert all(codec != "raw" for block, codec in published.delivered if block.position > 6)


@pytest.mark.parametrize(("name", "spec"), list(published_runs()))
def test_a_step_is_its_computation_and_what_is_exposed(name, spec):
    figures = PublishedRun(spec).run()
    compute_ns = 180 * figures.num_accesses
    parts = compute_ns + figures.exposed_ns + figures.decompression_ns
    assert figures.total_ns == pytest.approx(parts), name
