"""`penstock replay` as it is typed, over the log of a simulated run."""

import json
from pathlib import Path

import pytest

from penstock.cli import main
from tests.sim.test_recording import record


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("log") / "run.log"
    record(path)
    return str(path)


def test_recorded_and_simulated_stand_beside_each_other(
    log: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", log]) == 0
    head, row = capsys.readouterr().out.splitlines()[2:4]
    assert head.split() == ["recorded", "simulated"]
    recorded, simulated = map(float, row.split()[-2:])
    assert simulated == pytest.approx(recorded, rel=0.05)


def test_one_thing_changed_is_a_third_column(log: str, capsys: pytest.CaptureFixture[str]) -> None:
    change = ["--speed", "4", "--json"]
    assert main(["replay", log, *change]) == 0
    runs = json.loads(capsys.readouterr().out)
    assert list(runs) == ["recorded", "simulated", "changed"]
    assert runs["changed"]["tpot_ms"]["p50"] > 1.03 * runs["simulated"]["tpot_ms"]["p50"]
    assert runs["changed"]["requests"] == runs["recorded"]["requests"]


def test_steps_are_as_large_as_the_log_says_and_an_older_one_has_to_be_told(
    log: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefills = []
    for more in ([], ["--max-num-batched-tokens", "8192"], ["--max-num-batched-tokens", "64"]):
        assert main(["replay", log, "--json", *more]) == 0
        prefills.append(json.loads(capsys.readouterr().out)["simulated"])
    assert prefills[0] == prefills[1] != prefills[2]
    older = tmp_path / "older.log"
    older.write_text(Path(log).read_text().replace('"max_num_batched_tokens":8192', '"_":0'))
    assert main(["replay", str(older)]) == 1
    assert "--max-num-batched-tokens" in capsys.readouterr().err


def test_another_rule_is_a_change_of_what_was_recorded(
    log: str, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ["replay", log, "--json"]
    runs = []
    for policy in ("least_loaded", "predicted"):
        assert main([*again, "--policy", policy]) == 0
        runs.append(json.loads(capsys.readouterr().out))
    # The log says that it was the first of the two.
    assert list(runs[0]) == ["recorded", "simulated"]
    assert list(runs[1]) == ["recorded", "simulated", "changed"]
    assert runs[1]["simulated"] == runs[0]["simulated"] != runs[1]["changed"]


def test_other_workers(log: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "p.html"
    command = ["replay", log, "--cluster", "1xprefill,3xdecode", "--report", str(page)]
    assert main([*command, "--slo-ttft-ms", "50"]) == 0
    assert "changed" in capsys.readouterr().out
    assert ">decode-2</text>" in page.read_text()


@pytest.mark.parametrize("cluster", ["2", "2xcook", "1xprefill,2xprefill", "0xmixed"])
def test_other_workers_must_make_sense(
    log: str, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", log, "--cluster", cluster]) == 1
    assert "--cluster" in capsys.readouterr().err


def test_a_log_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(tmp_path / "none")]) == 1
    assert "cannot be read" in capsys.readouterr().err
