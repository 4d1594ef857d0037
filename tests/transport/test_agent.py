import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import BackendUnavailable, BadRequest, PeerLost
from penstock.transport import Agent

KEY = bytes(range(32))
EXAMPLE = Path(__file__).parents[2] / "examples" / "move_tensor.py"


@pytest.fixture
def agents():
    agents = [Agent("giver", key=KEY), Agent("taker", key=KEY)]
    yield agents
    for agent in agents:
        agent.close()


def test_registered_connected_pulled_and_told(agents):
    giver, taker = agents
    pool = giver.allocate(16, 256)
    pool.blocks[:] = np.arange(16)[:, None]
    into = taker.register(np.zeros((4, 64), np.float32))

    peer = taker.connect(giver.descriptor())
    pulled = taker.pull(peer, [3, 4, 9], into, [1, 2, 0])
    taker.notify(peer, b"done")

    assert into.blocks[:, 0].tolist() == [9, 3, 4, 0]
    assert (pulled.num_bytes, pulled.num_spans, pulled.transport) == (768, 2, "shm")
    assert giver.notifications() == [("taker", b"done")]
    assert giver.notifications() == []


def test_memory_that_existed_before_is_read_over_tcp(agents):
    giver, taker = agents
    giver.allocate(1, 8)
    array = np.arange(24, dtype=np.int64).reshape(6, 2, 2)
    giver.register(array)
    into = taker.register(np.zeros((6, 2, 2), np.int64))

    pulled = taker.pull(
        taker.connect(giver.descriptor()), np.arange(6), into, np.arange(6)[::-1], region=1
    )

    assert (into.blocks.view(np.int64).reshape(6, 2, 2) == array[::-1]).all()
    assert pulled.transport == "tcp"


def test_a_transport_can_be_forced():
    with Agent("giver", key=KEY) as giver, Agent("taker", key=KEY, transport="tcp") as taker:
        giver.allocate(4, 64)
        into = taker.allocate(4, 64)
        assert taker.pull(taker.connect(giver.descriptor()), [0], into, [0]).transport == "tcp"
    with Agent(key=KEY) as giver, Agent(key=KEY, transport="shm") as taker:
        giver.register(np.zeros((4, 64), np.uint8))
        peer = taker.connect(giver.descriptor())
        with pytest.raises(PeerLost, match="shm: private memory cannot be mapped"):
            taker.pull(peer, [0], taker.allocate(4, 64), [0])
    with pytest.raises(BadRequest, match="carrier pigeon"):
        Agent(key=KEY, transport="carrier pigeon")


def test_nixl_that_is_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "nixl._bindings", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'penstock\[nixl\]'"):
        Agent(key=KEY, transport="nixl")


def test_auto_takes_nixl_where_both_ends_have_it_and_rdma(monkeypatch):
    pytest.importorskip("nixl")
    with Agent(key=KEY) as old, monkeypatch.context() as patch:
        # RDMA is what this machine may lack: UCX then finds another way to the same memory.
        patch.setattr("penstock.transport.agent.is_worthwhile", lambda: True)
        with Agent(key=KEY) as giver, Agent(key=KEY) as taker:
            used = []
            for owner in (giver, old):
                owner.register(np.full((4, 64), 7, np.uint8))
                owner.allocate(4, 64).blocks[:] = 7
                into, peer = taker.allocate(4, 64), taker.connect(owner.descriptor())
                pulls = [taker.pull(peer, [1], into, [to], region=to) for to in (0, 1)]
                used += [pulled.transport for pulled in pulls]
                assert into.blocks[:, 0].tolist() == [7, 7, 0, 0]
            peer = old.connect(giver.descriptor())
            used.append(old.pull(peer, [1], old.allocate(1, 64), [0]).transport)
    assert used == ["nixl", "shm", "tcp", "shm", "tcp"]


@pytest.mark.parametrize("transport", ["shm", "tcp", "nixl"])
def test_a_peer_that_came_back_is_another(transport):
    if transport == "nixl":
        pytest.importorskip("nixl")
    with Agent("taker", key=KEY, transport=transport) as taker:
        into = taker.allocate(4, 64)
        with Agent("giver", key=KEY, transport=transport) as giver:
            giver.allocate(4, 64).blocks[:] = 1
            old_descriptor = giver.descriptor()
            old = taker.connect(old_descriptor)
            taker.pull(old, [0], into, [0])
        with Agent("giver", key=KEY, transport=transport) as giver:
            giver.allocate(4, 64).blocks[:] = 2
            new = taker.connect(giver.descriptor())

            with pytest.raises(PeerLost, match="epoch"):
                taker.pull(old, [0], into, [0])
            with pytest.raises(PeerLost, match="epoch"):
                taker.notify(old, b"x")
            taker.pull(new, [0], into, [1])

            assert into.blocks[:, 0].tolist() == [1, 2, 0, 0]
            taker.connect(old_descriptor)
            with pytest.raises(PeerLost):
                taker.pull(old, [0], into, [0])


def test_an_old_descriptor_at_an_address_that_is_used_again_is_refused(free_port):
    with Agent("taker", key=KEY, transport="tcp") as taker:
        into = taker.allocate(4, 64)
        with Agent("giver", key=KEY, port=free_port) as giver:
            giver.allocate(4, 64)
            old = taker.connect(giver.descriptor())
        with Agent("giver", key=KEY, port=free_port) as giver:
            giver.allocate(4, 64)
            with pytest.raises(PeerLost, match="another epoch"):
                taker.pull(old, [0], into, [0])
            with pytest.raises(PeerLost, match="another epoch"):
                taker.notify(old, b"x")


@pytest.mark.parametrize(
    ("source_blocks", "destination_blocks"),
    [([4], [0]), ([0], [4]), ([-1], [0]), ([0, 1], [0]), ([2**63], [0]), ([2**62, 0], [0, 1])],
)
def test_blocks_that_are_none_are_refused(agents, source_blocks, destination_blocks):
    giver, taker = agents
    giver.allocate(4, 64).blocks[:] = 1
    into = taker.allocate(4, 64)
    peer = taker.connect(giver.descriptor())

    with pytest.raises(BadRequest):
        taker.pull(peer, source_blocks, into, destination_blocks)

    assert not into.blocks.any()


def test_more_notifications_than_there_is_room_for_are_refused(agents):
    giver, taker = agents
    peer = taker.connect(giver.descriptor())
    for _ in range(4096):
        taker.notify(peer, b"x")

    with pytest.raises(PeerLost, match="too many notifications"):
        taker.notify(peer, b"x")

    assert len(giver.notifications()) == 4096
    taker.notify(peer, b"there is room again")
    with pytest.raises(BadRequest, match="too long"):
        taker.notify(peer, bytes(1 << 16))


def test_memory_that_has_holes_is_refused(agents):
    for array in (np.zeros((4, 8))[:, ::2], np.zeros((0, 8)), np.zeros(())):
        with pytest.raises(BadRequest, match="contiguous"):
            agents[0].register(array)


@given(st.binary(max_size=200))
def test_junk_is_no_descriptor(junk):
    if not _AGENTS:
        _AGENTS.append(Agent(key=KEY))
    with pytest.raises(BadRequest, match="descriptor"):
        _AGENTS[0].connect(junk)


_AGENTS = []


@pytest.mark.parametrize(
    ("options", "transport"),
    [
        ([], "shm"),
        (["--transport", "tcp"], "tcp"),
        (["--own-memory"], "tcp"),
        (["--transport", "nixl", "--own-memory"], "nixl"),
    ],
)
def test_the_example_moves_a_tensor(options, transport, no_leaks, tmp_path, monkeypatch):
    if transport == "nixl":
        pytest.importorskip("nixl")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLE.parents[1]))
    command = [sys.executable, str(EXAMPLE), *options]

    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)

    assert done.returncode == 0, done.stderr
    assert f"8 MiB over {transport} in 32 spans" in done.stdout
    assert "taker says: thank you" in done.stdout
