"""A decision log as a workload, and step times learnt from it: from a run whose truth is known."""

from pathlib import Path

import numpy as np
import pytest

from penstock.core.errors import BadRequest
from penstock.core.node import DecisionLog
from penstock.core.types import NS_PER_S, Role
from penstock.sim.choose import WorkloadSpec, make_workload
from penstock.sim.fleet import parse_fleet
from penstock.sim.observe import Observation
from penstock.sim.profile import layout_of
from penstock.sim.recording import fit, read_recording
from penstock.sim.serve import ModelledCluster, ServeSpec
from penstock.sim.summary import Slo, summarise

MEMBERS = parse_fleet("H100:prefill,H100:decode", "llama3.1-8b")


def record(path: Path) -> Observation:
    """Write the log that a real controller would have written; return what its clients saw."""
    arrivals = make_workload(WorkloadSpec(source="lognormal", rate=6.0, duration_s=40.0))
    with path.open("wb") as file:
        log = DecisionLog(limit=1, sink=lambda line: file.write(line) and None)
        spec = ServeSpec(members=MEMBERS, max_repeats=1)
        return ModelledCluster(spec, arrivals, log).run(limit_s=500)


def test_a_run_read_back_is_the_run_and_simulates_to_the_same_figures(tmp_path: Path) -> None:
    seen = record(tmp_path / "log")
    recording = read_recording(str(tmp_path / "log"))
    for one, other in zip(recording.served, seen.served, strict=True):
        assert (one.input_tokens, one.num_tokens) == (other.input_tokens, other.num_tokens)
        # The log is written where the controller stands, one message before the client.
        assert one.ttft_s == pytest.approx(other.ttft_s, abs=1e-4)
        assert one.e2e_s == pytest.approx(other.e2e_s, abs=1e-4)
    for request, served in recording.requests:
        first_ns, *_, last_ns = stamps = recording.tokens_ns[request.request_id]
        assert (first_ns, last_ns) == (served.first_token_ns, served.finished_ns)
        assert (len(stamps), stamps) == (served.num_tokens, sorted(stamps))
    members = recording.members()
    assert [m.role for m in members] == [Role.PREFILL, Role.DECODE]
    truth = MEMBERS[0].hardware.times
    decode_ms = [m.hardware.times.duration_ns(0, 0, 8, 12_000) / 1e6 for m in members]
    assert decode_ms == pytest.approx([truth.duration_ns(0, 0, 8, 12_000) / 1e6] * 2, rel=0.03)
    prefill_ns = members[0].hardware.times.duration_ns(2000, 4_000_000, 0, 0)
    assert prefill_ns == pytest.approx(truth.duration_ns(2000, 4_000_000, 0, 0), rel=0.05)
    spec = ServeSpec(
        members=members, fabric=recording.fabric(), layout=layout_of("llama3.1-8b", 128)
    )
    again = ModelledCluster(spec, recording.arrivals()).run(limit_s=500)
    was, now = summarise(seen, Slo()), summarise(again, Slo())
    assert now.ttft_ms.p50 == pytest.approx(was.ttft_ms.p50, rel=0.05)
    assert now.tpot_ms.p50 == pytest.approx(was.tpot_ms.p50, rel=0.05)
    assert now.ttft_ms.p99 == pytest.approx(was.ttft_ms.p99, rel=0.1)
    assert now.requests == was.requests


def test_a_line_cut_off_at_the_end_is_left_out_and_junk_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log"
    record(path)
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    assert read_recording(str(path)).requests
    lines = data.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:5], b"{junk}\n", *lines[5:]]))
    with pytest.raises(BadRequest, match=r"log:6 is no decision"):
        read_recording(str(path))


def test_a_log_without_requests_says_which_file_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"")
    with pytest.raises(BadRequest, match="--decision-log"):
        read_recording(str(path))
    with pytest.raises(BadRequest, match="cannot be read"):
        read_recording(str(tmp_path / "none"))


def test_a_fit_finds_the_coefficients_in_spite_of_noise_and_stalls() -> None:
    rng = np.random.default_rng(0)
    rows = np.stack([np.ones(400), rng.integers(1, 64, 400), rng.integers(1, 90_000, 400)], 1)
    durations = rows @ np.array([4e6, 1e4, 40.0]) * rng.normal(1.0, 0.1, 400)
    durations[::40] *= 20
    predicted = rows @ np.array(fit(rows, durations))
    assert predicted == pytest.approx(rows @ np.array([4e6, 1e4, 40.0]), rel=0.06)
    # A part that is not there comes out as none, never as less.
    assert fit(rows, rows[:, 1] * 1e5)[0] == pytest.approx(0.0, abs=NS_PER_S * 1e-9)
