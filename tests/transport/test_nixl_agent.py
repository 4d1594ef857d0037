"""The library for real: its settings, and reads between processes, over UCX on loopback."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from penstock.core.descriptors import Endpoint, RegionDescriptor
from penstock.core.errors import BackendUnavailable, PeerLost
from penstock.transfer.plan import cut
from penstock.transfer.region import PeerMemory, Region
from penstock.transport.nixl import Nixl
from penstock.transport.nixl_agent import has_rdma, load_bindings

ROOT = Path(__file__).parents[2]


def test_rdma_is_what_the_system_lists(tmp_path):
    assert not has_rdma(tmp_path / "none")
    assert not has_rdma(tmp_path)
    (tmp_path / "mlx5_0").touch()
    assert has_rdma(tmp_path)


def test_settings_of_the_environment_are_left_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "nixl._bindings", None)
    monkeypatch.setenv("UCX_LOG_LEVEL", "info")
    monkeypatch.setenv("UCX_MODULES", "all")
    monkeypatch.setenv("NIXL_LOG_LEVEL", "to be deleted")
    monkeypatch.delenv("NIXL_LOG_LEVEL")
    with pytest.raises(BackendUnavailable, match="pip install"):
        load_bindings()
    assert os.environ["UCX_LOG_LEVEL"] == "info"
    assert os.environ["UCX_MODULES"] == "all"
    assert os.environ["NIXL_LOG_LEVEL"] == "FATAL"


# ------------------------------------------------------------------------------- several processes

OWNER = """
import sys
import msgspec
import numpy as np
from penstock.transfer.region import Region
from penstock.transport.nixl_owner import NixlOwner

owner = NixlOwner(epoch=int(sys.argv[1]))
blocks = np.zeros((4096, 4096), np.uint8)
blocks[:] = (np.arange(4096)[:, None] + int(sys.argv[1])) % 251
owner.add(Region(blocks))
print(owner.endpoint.address, flush=True)
sys.stdin.read()
owner.close()
"""


def start_owner(epoch: int) -> tuple[subprocess.Popen[str], PeerMemory]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(epoch)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    address = process.stdout.readline().strip()
    regions = (RegionDescriptor("", "", 4096 * 4096, 4096),)
    return process, PeerMemory("p", epoch, regions, (Endpoint("nixl", address),))


@pytest.mark.slow
def test_an_owner_ends_cleanly_and_one_that_is_killed_is_lost(no_leaks):
    pytest.importorskip("nixl")
    way = Nixl(silence_s=2.0)
    into, blocks = Region(np.zeros((4096, 4096), np.uint8)), np.arange(4096)
    process, memory = start_owner(1)
    with process:
        source = way.open(memory, 0)
        source.pull(into, cut(blocks, blocks[::-1]))
        assert (into.blocks[::-1, 0] == (blocks + 1) % 251).all()
        process.stdin.close()
        assert process.wait(20) == 0
    with pytest.raises(PeerLost):
        source.pull(into, cut(blocks, blocks))

    process, memory = start_owner(2)
    with process:
        source = way.open(memory, 0)
        source.pull(into, cut(blocks, blocks))
        assert (into.blocks[:, 0] == (blocks + 2) % 251).all()
        process.kill()
        process.wait()
    for _ in range(2):
        started = time.monotonic()
        with pytest.raises(PeerLost):
            source.pull(into, cut(blocks, blocks))
        assert time.monotonic() < started + 10
    way.close()


READER = """
import atexit
import signal
import sys
import time
import numpy as np
from penstock.core.errors import DeadlineExceeded, PeerLost
from penstock.transfer.plan import cut
from penstock.transfer.region import Region
from penstock.transport.nixl import Nixl
from penstock.transport.nixl_agent import has_rdma, load_bindings
from tests.transport.test_nixl_agent import start_owner

blocks = np.arange(4096)
process, memory = start_owner(1)
atexit.register(process.kill)
way = Nixl(silence_s=1.0)
source = way.open(memory, 0)
into = Region(np.zeros((4096, 4096), np.uint8))
source.pull(into, cut(blocks, blocks))
assert (into.blocks[:, 0] == (blocks + 1) % 251).all()
if sys.argv[1] == "stopped":
    process.send_signal(signal.SIGSTOP)
    into.blocks[:] = 0
    try:
        source.pull(into, cut(blocks, blocks[::-1]))
        sys.exit("a process that is stopped has answered")
    except DeadlineExceeded:
        pass
    into.blocks[:] = 7
    process.send_signal(signal.SIGCONT)
    time.sleep(0.5)
    assert (into.blocks == 7).all(), "late bytes have landed"
process.kill()
process.wait()
started = time.monotonic()
try:
    source.pull(into, cut(blocks, blocks))
    sys.exit("the dead have answered")
except (PeerLost, DeadlineExceeded):
    assert time.monotonic() < started + 10
process, memory = start_owner(2)
source = way.open(memory, 0)
source.pull(into, cut(blocks, blocks))
assert (into.blocks[:, 0] == (blocks + 2) % 251).all()
process.stdin.close()
process.wait()
way.close()
print("right")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_over_ucx_tcp_silence_has_a_limit_and_nothing_lands_late(how, no_leaks, monkeypatch):
    pytest.importorskip("nixl")
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    command = [sys.executable, "-c", READER, how]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, check=False, cwd=ROOT
    )
    assert (done.stdout, done.returncode) == ("right\n", 0), done.stderr
