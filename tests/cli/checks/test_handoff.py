"""What keeps two processes from moving blocks is found; the rest is measured all the same."""

import dataclasses
import sys

import numpy as np
import pytest

from penstock.cli.checks import handoff, rates
from penstock.cli.checks.finding import Extent, Finding, State
from penstock.cli.checks.handoff import check_handoff, check_peer
from penstock.cli.checks.peer import Peer
from penstock.cli.checks.rates import Plain, _rate_findings
from penstock.core.errors import BackendUnavailable, PeerLost, StartupFailed
from penstock.core.types import MIB
from penstock.transport.key import cluster_key
from penstock.transport.shm import MappedPool, SharedMemory
from penstock.transport.tcp import Tcp

EXTENT = Extent(is_quick=True, moved_bytes=MIB, repetitions=2)

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture(autouse=True)
def _private_key(monkeypatch) -> None:
    monkeypatch.setenv("PENSTOCK_CLUSTER_KEY", "a key for these tests alone")


def look() -> dict[str, Finding]:
    return {finding.name: finding for finding in check_handoff(EXTENT)}


def refuse(*_arguments: object) -> None:
    raise PeerLost("Permission denied")


def test_memory_of_others_that_cannot_be_mapped(monkeypatch):
    monkeypatch.setattr(SharedMemory, "open", refuse)
    found = look()
    assert found["shm"].state is State.FAILED
    assert "Permission denied" in found["shm"].said
    assert "--transport tcp" in found["shm"].advice
    assert found["tcp"].state is State.OK
    assert "tcp in 16 spans" in found
    assert "shm in 1 span" not in found


def test_loopback_that_is_closed(monkeypatch):
    monkeypatch.setattr(Tcp, "open", refuse)
    found = look()
    assert found["tcp"].state is State.WARNING
    assert "firewall" in found["tcp"].advice
    assert found["shm"].state is State.OK


def test_wrong_bytes_are_seen(monkeypatch):
    pull = MappedPool.pull

    def flip(self: MappedPool, destination, spans) -> None:
        pull(self, destination, spans)
        destination.blocks[3, 7] ^= 1

    monkeypatch.setattr(MappedPool, "pull", flip)
    assert look()["shm"].state is State.FAILED


def test_a_stranger_who_is_let_in_is_a_failure(monkeypatch):
    monkeypatch.setattr(handoff.secrets, "token_bytes", lambda count: b"k" * count)
    found = look()
    assert found["authentication"].state is State.FAILED


def test_a_second_process_that_cannot_start(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (finding,) = check_handoff(EXTENT)
    assert finding.state is State.FAILED
    assert finding.advice
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    (finding,) = check_handoff(EXTENT)
    assert "No such file" in finding.said


def test_other_names_and_another_clock(monkeypatch):
    monkeypatch.setattr(handoff, "name_of_a_block", lambda: "another")
    monkeypatch.setattr(Plain, "skew_ns", lambda _self, is_one_host: (5_000_000_000, 20_000))
    found = look()
    assert found["version"].state is State.FAILED
    assert found["clock"].state is State.WARNING
    assert found["clock"].figures["clock_skew_s"] == 5.0


def test_the_clock_of_a_process_on_this_machine_is_ours():
    assert abs(look()["clock"].figures["clock_skew_s"]) < 0.5


def test_a_rate_far_below_what_is_possible_is_a_warning():
    measured = {
        "memcpy": 20e9, "socket": 4e9,
        "shm in 1": 19e9, "shm in n": 4e9, "tcp in 1": 1e9, "tcp in n": 3.9e9,
    }  # fmt: skip
    found = {f.name: f for f in _rate_findings(measured, 1024)}
    assert [name for name, f in found.items() if f.state is State.WARNING] == [
        "shm in 1,024 spans",
        "tcp in 1 span",
    ]
    assert found["shm in 1,024 spans"].figures["share"] == pytest.approx(0.2)
    slow = next(_rate_findings(measured | {"memcpy": 1e9}, 1024))
    assert slow.state is State.WARNING


def test_what_is_scattered_takes_as_many_spans_as_blocks():
    @dataclasses.dataclass
    class Seen:
        spans: list[np.ndarray]

        def pull(self, _destination, spans: np.ndarray) -> None:
            self.spans.append(spans)

    seen = Seen([])
    region = handoff.SharedPool(16, 64).region
    moves = rates._moves(None, {"x": (seen, seen)}, region)
    moves["x in 1"]()
    moves["x in n"]()
    assert [len(spans) for spans in seen.spans] == [1, 16]
    assert int(seen.spans[1][:, 0].max()) < 32


def test_nixl_is_missed_where_there_is_rdma_and_only_there(monkeypatch):
    monkeypatch.setattr(handoff, "is_installed", lambda: False)
    monkeypatch.setattr(handoff, "has_rdma", lambda: False)
    assert handoff._start_nixl().state is State.OK
    monkeypatch.setattr(handoff, "has_rdma", lambda: True)
    assert "pip install" in handoff._start_nixl().advice


def test_nixl_that_does_not_start_or_lead_anywhere(monkeypatch):
    def break_down() -> None:
        raise BackendUnavailable("NIXL cannot start UCX: no devices")

    monkeypatch.setattr(handoff, "is_installed", lambda: True)
    monkeypatch.setattr(handoff, "Nixl", break_down)
    finding = handoff._start_nixl()
    assert finding.state is State.WARNING
    assert "no devices" in finding.said
    assert "TCP is used" in handoff._no_nixl("it says nothing", {}).advice


# --- a peer that is called at an address


def look_at(port: int) -> dict[str, Finding]:
    return {finding.name: finding for finding in check_peer(EXTENT, "127.0.0.1", port)}


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_peer_at_an_address(host: str):
    with Peer(cluster_key(), host, moved_bytes=MIB) as peer:
        found = look_at(peer.port)
    assert {finding.state for finding in found.values()} <= {State.OK, State.WARNING}
    assert found["tcp"].state is State.OK
    assert found["tcp in 16 spans"].figures["bytes_per_s"] > 0
    # It has given everything back: nobody listens any more.
    assert "--listen" in look_at(peer.port)["peer"].advice


def test_a_peer_with_another_key_tells_nothing(monkeypatch):
    with Peer(b"k" * 32, moved_bytes=MIB) as peer:
        found = look_at(peer.port)
    assert list(found) == ["peer"]
    assert found["peer"].state is State.FAILED
    assert "PENSTOCK_CLUSTER_KEY" in found["peer"].advice


def test_a_peer_of_another_version_on_another_host(monkeypatch):
    with Peer(cluster_key(), moved_bytes=MIB) as peer:
        monkeypatch.setattr(handoff, "VERSION", "99.0")
        monkeypatch.setattr(handoff, "host_id", lambda: "another")
        monkeypatch.setattr(SharedMemory, "open", refuse)
        found = look_at(peer.port)
    assert found["version"].state is State.FAILED
    assert found["version"].said.endswith("99.0 here")
    assert found["shm"].state is State.OK
    assert "another host" in found["shm"].said
    assert abs(found["clock"].figures["clock_skew_s"]) < 0.5


def test_a_port_that_is_taken():
    with Peer(b"k" * 32, moved_bytes=MIB) as peer, pytest.raises(StartupFailed, match="in use"):
        Peer(b"k" * 32, port=peer.port, moved_bytes=MIB)
