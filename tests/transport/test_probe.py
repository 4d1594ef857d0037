"""Every way to a peer is tried and measured beside its limit; what leads nowhere says why."""

import os
import struct
from contextlib import closing
from pathlib import Path

import pytest

from penstock.core.block import KVGroup, KVLayout
from penstock.core.descriptors import Endpoint, RegionDescriptor, WorkerInfo
from penstock.core.errors import BackendUnavailable
from penstock.core.links import WayTried
from penstock.core.types import Role, WorkerId
from penstock.transport import probe as module
from penstock.transport.probe import Prober, link_rate
from penstock.transport.shm import SharedMemory, SharedPool
from penstock.transport.tcp import Tcp
from penstock.transport.tcp_owner import TcpOwner
from penstock.transport.way import Way

KEY = bytes(range(32))
LAYOUT = KVLayout(
    num_kv_heads=1, head_dim=8, block_size=16, dtype="float32", groups=(KVGroup((0,)),), model="m"
)
NUM_BLOCKS, BLOCK_BYTES = 64, 4096


def info(*regions: RegionDescriptor, endpoints: tuple[Endpoint, ...] = ()) -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId("p"),
        role=Role.PREFILL,
        epoch=7,
        address="",
        pid=os.getpid(),
        layout=LAYOUT,
        num_blocks=(NUM_BLOCKS,),
        max_model_len=64,
        max_num_seqs=1,
        regions=regions,
        endpoints=endpoints,
    )


def no_nixl() -> Way:
    raise BackendUnavailable("NIXL is not installed")


def try_all(peer: WorkerInfo, *used: str, key: bytes = KEY) -> dict[str, WayTried]:
    prober = Prober({"shm": SharedMemory, "nixl": no_nixl, "tcp": lambda: Tcp(key)}, used)
    return {way.kind: way for way in prober.probe(peer, 1 << 17)}


def test_what_leads_there_is_measured_and_the_first_in_use_is_marked():
    with closing(SharedPool(NUM_BLOCKS, BLOCK_BYTES)) as pool, closing(TcpOwner(7, KEY)) as owner:
        owner.add(pool.region)
        peer = info(pool.descriptor, endpoints=(owner.endpoint, Endpoint("nixl", "?")))
        tried = try_all(peer, "nixl", "tcp", "shm")
        for kind, limit in (("shm", "a copy in one process"), ("tcp", "a plain socket")):
            way = tried[kind]
            assert (way.refusal, way.limit, way.num_bytes) == ("", limit, 1 << 17)
            assert way.name.startswith(kind)
            assert min(way.opening_ns, way.bytes_per_s, way.limit_bytes_per_s) > 0
        assert tried["nixl"].refusal == "NIXL is not installed"
        # NIXL comes first where requests choose, and does not lead there.
        assert [way.kind for way in tried.values() if way.is_used] == ["tcp"]


def test_a_pool_that_is_smaller_than_what_is_asked_for_is_read_once():
    with closing(SharedPool(3, BLOCK_BYTES)) as pool:
        assert try_all(info(pool.descriptor), "shm")["shm"].num_bytes == 3 * BLOCK_BYTES


def test_what_does_not_lead_there_says_why():
    with closing(SharedPool(NUM_BLOCKS, BLOCK_BYTES)) as pool:
        descriptor = pool.descriptor
        tried = try_all(info(descriptor), "tcp")
        assert "p serves no reads that way: the server needs --listen" in tried["tcp"].refusal
        assert "p serves no reads that way" in tried["nixl"].refusal
        assert tried["cuda_ipc"].refusal
        assert not any(way.is_used for way in tried.values())
    assert "cannot be opened" in try_all(info(descriptor), "shm")["shm"].refusal


def test_a_peer_with_another_key_or_gone_is_a_refusal():
    with closing(SharedPool(NUM_BLOCKS, BLOCK_BYTES)) as pool:
        with closing(TcpOwner(7, KEY)) as owner:
            peer = info(pool.descriptor, endpoints=(owner.endpoint,))
            assert "does not accept our cluster key" in try_all(peer, key=bytes(32))["tcp"].refusal
        assert "cannot be called" in try_all(peer)["tcp"].refusal


def test_a_link_s_rate_is_what_its_device_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def ask(_socket: object, request: int, packed: bytes) -> bytes:
        assert request == 0x8915
        if packed.startswith(b"lo\0"):
            raise OSError("no address")
        return struct.pack("16s4x4s8x", packed[:16], bytes((10, 0, 0, 5)))

    monkeypatch.setattr(module.fcntl, "ioctl", ask)
    monkeypatch.setattr(module.socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    (tmp_path / "eth0").mkdir()
    speed = tmp_path / "eth0" / "speed"
    speed.write_text("10000\n")
    assert link_rate("10.0.0.5", tmp_path) == ("eth0", 1.25e9)
    speed.write_text("-1\n")
    with pytest.raises(ValueError, match=r"10\.0\.0\.5"):
        link_rate("10.0.0.5", tmp_path)
    with pytest.raises(ValueError, match=r"10\.0\.0\.6"):
        link_rate("10.0.0.6", tmp_path)
