"""`penstock doctor` as a user runs it, and how it speaks."""

import json
import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from penstock.cli import doctor
from penstock.cli.checks.finding import Extent, State, failed, ok, warning

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "penstock", "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("no_leaks")
def test_everything_is_looked_at_and_a_script_can_read_it(tmp_path: Path):
    done = run("--json", XDG_CONFIG_HOME=str(tmp_path))
    report = json.loads(done.stdout)
    assert done.stderr == ""  # progress is for terminals
    findings = {f["name"]: f for section in report["sections"].values() for f in section}
    failures = [f for f in findings.values() if f["state"] == "failed"]
    assert (done.returncode, report["is_ok"]) == ((1, False) if failures else (0, True))
    assert not failures
    for name in ("python", "torch", "engine", "kernels", "shm", "tcp", "memory", "cores"):
        assert name in findings
    assert all(f["advice"] for f in findings.values() if f["state"] != "ok")
    # Measured, and told apart: a scattered pull takes as many spans as it has blocks.
    for name in ("memory copy", "plain socket", "shm in 1,024 spans", "tcp in 1,024 spans"):
        assert findings[name]["figures"]["bytes_per_s"] > 1e6
    assert 0 < findings["tcp in 1 span"]["figures"]["share"] < 20
    assert findings["tcp latency"]["figures"]["seconds"] > 0
    assert (tmp_path / "penstock" / "cluster.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.usefixtures("no_leaks")
def test_what_fails_is_said_with_the_next_step_and_the_exit_status(tmp_path: Path):
    long = tmp_path / ("x" * 120)  # no socket's path may be as long
    long.mkdir()
    done = run(
        "--quick",
        XDG_RUNTIME_DIR=str(long),
        XDG_CACHE_HOME=str(tmp_path),
        CXX="no-such-compiler",
        PENSTOCK_CLUSTER_KEY="short",
    )
    assert done.returncode == 1, done.stdout
    lines = done.stdout.splitlines()
    (folder,) = [i for i, line in enumerate(lines) if line.startswith("  failed  private folder")]
    assert "XDG_RUNTIME_DIR or TMPDIR to a short path" in lines[folder + 1]
    (native,) = [i for i, line in enumerate(lines) if line.startswith("  warning native transport")]
    assert "install a C++17 compiler" in lines[native + 1]
    (key,) = [i for i, line in enumerate(lines) if line.startswith("  warning cluster key")]
    assert "PENSTOCK_CLUSTER_KEY" in lines[key + 1]
    # Without a compiler Python moves the blocks, and the report says so.
    assert "(shm (numpy))" in done.stdout
    assert "(tcp (python))" in done.stdout
    assert "1 failed" in lines[-1]


def options(**values: bool) -> Namespace:
    plain = {"json": False, "quick": True, "peers": [], "listen": None, "cluster": None}
    return Namespace(**(plain | values))


def test_warnings_do_not_fail(monkeypatch, capsys):
    found = [ok("a", "well"), warning("b", "so-so", "do this")]
    monkeypatch.setattr(doctor, "SECTIONS", {"part": {"it": lambda _extent: iter(found)}})
    assert doctor.doctor(options()) == 0
    text = capsys.readouterr().out
    assert "part\n  ok      a" in text
    assert "→ do this" in text
    assert "1 warning above" in text


def test_a_check_that_stumbles_is_a_finding_and_the_others_go_on(monkeypatch, capsys):
    def stumbles(_extent: Extent):
        yield ok("first", "well")
        raise PermissionError(13, "not for you")

    def goes_on(_extent: Extent):
        yield failed("last", "bad", "mend it", count=2)

    checks = {"something": stumbles, "another thing": goes_on}
    monkeypatch.setattr(doctor, "SECTIONS", {"part": checks})
    assert doctor.doctor(options(json=True)) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["is_ok"]
    first, stumbled, last = report["sections"]["part"]
    assert first["state"] == State.OK.value
    assert "not for you" in stumbled["said"]
    assert last["figures"] == {"count": 2}


@pytest.mark.usefixtures("no_leaks")
def test_two_of_them_try_the_hand_off_and_ctrl_c_ends_the_one_that_listens():
    key = {"PENSTOCK_CLUSTER_KEY": "a key for this test alone"}
    listening = subprocess.Popen(
        [sys.executable, "-m", "penstock", "doctor", "--listen", "127.0.0.1:0"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | key,
    )
    with listening:
        assert listening.stdout is not None
        lines = [listening.stdout.readline(), listening.stdout.readline()]
        address = lines[1].split()[-1]
        done = run("--quick", "--json", address, **key)
        listening.send_signal(signal.SIGINT)
        assert listening.wait(20) == 0
    assert lines[1] == f"  penstock doctor {address}\n"
    assert done.returncode == 0, done.stdout
    (section,) = json.loads(done.stdout)["sections"].values()
    assert "tcp in 1,024 spans" in {finding["name"] for finding in section}
