"""`penstock sim memory` as a user runs it."""

import json

from penstock.cli import main


def test_exact_is_the_published_table(capsys):
    assert main(["sim", "memory", "--exact"]) == 0
    out = capsys.readouterr().out
    for figure in ("1,329,594,368", "708,837,376", "0.1441", "5,936,655.36", "12,917,341.91"):
        assert figure in out


def test_exact_as_json(capsys):
    assert main(["sim", "memory", "--exact", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["exact"]["kvflow"]["exposed_ns"] == 12_917_341.91
    assert record["runs"] == []


def test_recorded_accesses_with_a_chart(capsys, tmp_path):
    path, chart = tmp_path / "a.jsonl", tmp_path / "a.svg"
    lines = [
        json.dumps({"step": step, "layer": layer, "group": 0, "blocks": [0, step, step + 1]})
        for step in range(5)
        for layer in range(2)
    ]
    path.write_text("\n".join(lines))
    command = ["sim", "memory", "--accesses", str(path), "--chart", str(chart), "--json"]
    assert main(command) == 0
    record = json.loads(capsys.readouterr().out)
    assert {run["policy"] for run in record["runs"]} == {"baseline", "ours"}
    assert all(run["num_accesses"] == 30 for run in record["runs"])
    assert chart.read_text().startswith("<svg")


def test_pressure_in_words(capsys):
    sizes = ["--layers", "1", "--tenants", "1", "--context", "2048", "--steps", "1"]
    assert main(["sim", "memory", "--pressure", *sizes]) == 0
    assert "next layer guessed" in capsys.readouterr().out


def test_a_file_that_is_not_there_is_explained(capsys, tmp_path):
    assert main(["sim", "memory", "--accesses", str(tmp_path / "none")]) == 1
    assert "cannot be read" in capsys.readouterr().err
