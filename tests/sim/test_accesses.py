"""Workloads of the memory machine: KVFlow's, made-up tenants, recorded files."""

import gzip

import pytest

from penstock.core.errors import BadRequest
from penstock.sim import kvflow
from penstock.sim.accesses import half_and_half, published, read_accesses, read_heads, tenants


def test_ours_may_lose_precision_only_where_kvflow_has_lost_it():
    """At every single access: what KVFlow itself could deliver was int8 or worse."""
    lossy = published().lossy
    run = kvflow.PublishedRun(kvflow.PublishedSpec())
    run.run()
    per_group = kvflow.NUM_BLOCKS
    assert len(run.delivered) == 20_288
    for block, codec in run.delivered:
        number = (block.layer * kvflow.NUM_HEADS + block.head) * per_group + block.position
        if number in lossy:
            assert codec != "raw"


def test_the_published_workload_is_whole():
    accesses = published()
    assert accesses.num_accesses == 20_288
    assert len(accesses.blocks) == 65_536
    assert accesses.hints == accesses.units


def test_tenants_follow_the_statistics_they_are_given():
    accesses = tenants(
        half_and_half(4, 4), num_tenants=3, context_blocks=100, num_steps=30, overlap=0.4, seed=1
    )
    assert len(accesses.units) == 4 * 30
    assert max(map(max, accesses.units)) < len(accesses.blocks) == 3 * 4 * 4 * 100
    # Eight heads of 16 read 6 + 3 blocks of every tenant, eight read 3.
    assert accesses.num_accesses == 30 * 3 * (8 * 9 + 8 * 3)
    known = sum(len(set(u) & set(h)) for u, h in zip(accesses.units, accesses.hints, strict=True))
    # Sink, window and two fifths of the rest come back, and popular blocks besides.
    assert 0.55 < known / accesses.num_accesses < 0.9
    assert accesses.units == (
        tenants(
            half_and_half(4, 4),
            num_tenants=3,
            context_blocks=100,
            num_steps=30,
            overlap=0.4,
            seed=1,
        ).units
    )


@pytest.mark.parametrize("is_compressed", [False, True])
def test_a_recorded_file_becomes_units_and_guesses(tmp_path, is_compressed):
    text = (
        '{"block_bytes": 4096, "compute_ns": 77}\n'
        '{"step": 0, "layer": 0, "group": 0, "blocks": [0, 3]}\n'
        '{"step": 0, "layer": 0, "group": 1, "blocks": [1]}\n'
        '{"step": 0, "layer": 1, "request": "b", "blocks": [2]}\n'
        '{"step": 1, "layer": 0, "group": 1, "blocks": [0]}\n'
    )
    path = tmp_path / ("a.jsonl.gz" if is_compressed else "a.jsonl")
    path.write_bytes(gzip.compress(text.encode()) if is_compressed else text.encode())
    accesses = read_accesses(path)
    # Four blocks to a group, in the order in which groups appear.
    assert accesses.units == [[0, 3, 5], [10], [4]]
    assert accesses.hints == [[], [], [5]]
    assert accesses.blocks == [0, 3, 4, 5, 10]
    assert (accesses.block_bytes, accesses.compute_ns) == (4096, 77)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("not json\n", "line 1"),
        ('{"step": 0, "blocks": "x"}\n', "line 1"),
        ('{"block_bytes": 1}\n', "no line with step"),
        ('{"step": 0, "blocks": [-1]}\n', "below 0"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, text, match):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(BadRequest, match=match):
        read_accesses(path)
    with pytest.raises(BadRequest, match="cannot be read"):
        read_accesses(tmp_path / "nowhere.jsonl")


def test_a_table_of_heads(tmp_path):
    path = tmp_path / "heads.tsv"
    path.write_text("6.05e-01\t0.0\n1.0\t0.25\n")
    assert read_heads(path) == [[0.605, 0.0], [1.0, 0.25]]
    path.write_text("1 2\n3\n")
    with pytest.raises(BadRequest, match="same number"):
        read_heads(path)
    path.write_text("one\n")
    with pytest.raises(BadRequest, match="not a table"):
        read_heads(path)
