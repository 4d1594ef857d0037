"""`penstock sim reuse` as a user runs it."""

import json

import pytest

from penstock.cli import main


@pytest.fixture
def path(tmp_path):
    rows = [
        {"input_length": 512 * 4 + 9, "output_length": 5, "hash_ids": [0, 1, 2, 3, 100 + i]}
        for i in range(20)
    ]
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def test_the_tables(capsys, path):
    assert main(["sim", "reuse", path]) == 0
    out = capsys.readouterr().out
    assert "20 requests, 80 full blocks of 512 tokens, 4 of them different" in out
    assert "HBM + DRAM + CXL + disk" in out


def test_as_json_every_policy_and_tier(capsys, path):
    assert main(["sim", "reuse", path, "--capacities", "512,4096", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [row["tokens"] for row in record["hit_rates"]] == [512, 4096]
    assert record["hit_rates"][1]["lru"] == pytest.approx(76 / 80)
    ttfts = [row["ttft_mean_ms"] for row in record["tiers"]]
    assert ttfts == sorted(ttfts, reverse=True), "more tiers never make it slower"


def test_a_wrong_file_is_explained(capsys, tmp_path):
    assert main(["sim", "reuse", str(tmp_path / "none")]) == 1
    assert "cannot be read" in capsys.readouterr().err
