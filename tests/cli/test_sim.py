"""`penstock sim` as it is typed: tables, JSON, pages, and what is refused."""

import json
from pathlib import Path

import pytest

from penstock.cli import main, sim_arguments
from penstock.control.policies import POLICIES

LOAD = ["--workload", "fixed:in=500,out=20", "--rate", "2", "--duration", "10"]
CLUSTER = ["--cluster", "H100:prefill,H100:decode"]


def test_a_run_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", "serve", *LOAD, *CLUSTER]) == 0
    out = capsys.readouterr().out
    words = ("TTFT", "TPOT", "E2E", "goodput", "prefix hits", "role changes", "transfer")
    for word in (*words, " events, "):
        assert word in out
    assert max(map(len, out.splitlines())) <= 120


def test_json_is_all_there_is_and_the_same_again(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for _ in range(2):
        assert main(["sim", "serve", *LOAD, *CLUSTER, "--seed", "3", "--json"]) == 0
        texts.append(capsys.readouterr().out)
    record = json.loads(texts[0])
    assert texts[0] == texts[1]
    assert record["settings"]["cluster"] == "1xH100-tp1:prefill,1xH100-tp1:decode"
    assert record["finished"] == record["requests"] > 10
    assert record["ttft_ms"]["p50"] <= record["ttft_ms"]["p99"]


def test_a_page_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.html"
    assert main(["sim", "serve", *LOAD, *CLUSTER, "--report", str(path)]) == 0
    assert path.read_text().startswith("<!doctype html>")
    assert str(path) in capsys.readouterr().out
    assert main(["sim", "serve", *LOAD, *CLUSTER, "--report", str(tmp_path / "no" / "x")]) == 1
    assert "--report" in capsys.readouterr().err


def test_a_fault_is_felt(capsys: pytest.CaptureFixture[str]) -> None:
    worst = []
    for fault in ([], ["--fault", "kill:decode-0@4"], ["--fault", "slow:prefill-0@1x30"]):
        assert main(["sim", "serve", *LOAD, *CLUSTER, *fault, "--json"]) == 0
        worst.append(json.loads(capsys.readouterr().out)["e2e_ms"]["max"])
    assert worst[0] < min(worst[1:])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--fault", "kill:decode-7@4"], "decode-0"),
        (["--fault", "slow:decode-0@4"], "xFACTOR"),
        (["--cluster", "9xZX81"], "no profile"),
        (["--min-workers", "3", "--max-workers", "2"], "begins with 2"),
        (["--workload", "nowhere.csv"], "neither a file nor a rule"),
    ],
)
def test_what_cannot_be_is_said(
    arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sim", "serve", *LOAD, *CLUSTER, *arguments]) == 1
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--rate", "0"], ["--rate", "x"], ["--burstiness", "-1"]])
def test_a_misuse_ends_with_two(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["sim", "serve", *LOAD, *CLUSTER, *arguments])
    assert end.value.code == 2


def test_a_sweep_tells_the_best_split(capsys: pytest.CaptureFixture[str]) -> None:
    heavy = ["--workload", "fixed:in=8000,out=20", "--rate", "12", "--duration", "8"]
    sweep = ["sim", "sweep", *heavy, "--cluster", "4xH100", "--slo-tpot-ms", "15"]
    assert main(sweep) == 0
    assert "3xH100-tp1:prefill,1xH100-tp1:decode" in capsys.readouterr().out.splitlines()[3]
    assert main([*sweep, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["best"] == "3xH100-tp1:prefill,1xH100-tp1:decode"
    assert len(record["splits"]) == 4
    assert set(record["best_at_slo_scale"]) == {"0.5", "1", "2", "4"}


def test_a_sweep_tells_the_fewest(capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["sim", "sweep", *LOAD, "--cluster", "H100", "--fewest", "4"]
    assert main([*sweep, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["fewest"] == 1
    assert set(record["fewest_at_slo_scale"]) == {"0.5", "1", "2", "4"}
    assert main([*sweep, "--slo-ttft-ms", "1", "--slo-scales", "1,1000"]) == 1
    out = capsys.readouterr().out
    assert "no size tried" in out
    assert "1x  more than 4 workers" in out
    assert "1000x     1 GPUs: 1xH100-tp1:mixed" in out


def test_policies_are_those_of_the_controller(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(POLICIES) == sim_arguments.POLICIES
    heavy = ["--workload", "lognormal", "--rate", "20", "--duration", "5"]
    hits = {}
    for policy in ("round_robin", "predicted"):
        pair = ["--cluster", "2xH100:prefill,2xH100:decode", "--policy", policy]
        assert main(["sim", "serve", *heavy, *pair, "--json"]) == 0
        record = json.loads(capsys.readouterr().out)
        hits[policy] = record["ttft_ms"]
        assert record["settings"]["policy"] == policy
    assert hits["round_robin"] != hits["predicted"]


def test_admission_refuses_what_would_be_late(capsys: pytest.CaptureFixture[str]) -> None:
    flood = ["--workload", "fixed:in=8000,out=20", "--rate", "40", "--duration", "5"]
    command = ["sim", "serve", *flood, *CLUSTER, "--slo-ttft-ms", "500", "--json"]
    records = []
    for extra in ([], ["--admission"]):
        assert main([*command, *extra]) == 0
        records.append(json.loads(capsys.readouterr().out))
    assert records[0]["failed"] == 0 < records[1]["failed"]
    assert records[0]["goodput_per_s"] < records[1]["goodput_per_s"]


def test_roles_follow_the_load_when_they_may(capsys: pytest.CaptureFixture[str]) -> None:
    heavy = ["--workload", "fixed:in=8000,out=10", "--rate", "14", "--duration", "40"]
    command = ["sim", "serve", *heavy, "--cluster", "1xH100:prefill,3xH100:decode", "--json"]
    records = []
    for extra in (["--no-role-switching"], []):
        assert main([*command, "--policy", "least_loaded", *extra]) == 0
        records.append(json.loads(capsys.readouterr().out))
    assert records[0]["flips"] == 0 < records[1]["flips"]
    assert records[0]["goodput_per_s"] < records[1]["goodput_per_s"]


@pytest.mark.parametrize("act", ["serve", "sweep"])
def test_help_has_examples(act: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sim", act, "--help"])
    assert f"penstock sim {act} --workload" in capsys.readouterr().out
