"""Reads through NIXL: with a double of the agent everywhere, over UCX for real where NIXL is."""

import base64
import secrets
import threading
import time

import msgspec
import numpy as np
import pytest

from penstock.core.descriptors import Endpoint, RegionDescriptor
from penstock.core.errors import DeadlineExceeded, PeerLost
from penstock.transfer.plan import cut
from penstock.transfer.region import PeerMemory, Region
from penstock.transport.cuda_ipc import CudaRegion
from penstock.transport.nixl import Nixl
from penstock.transport.nixl_owner import NixlAddress, NixlOwner
from tests.transport.double.nixl_agent import DoubleAgent

BLOCK_BYTES = 4096


def region_of(num_blocks: int, block_bytes: int = BLOCK_BYTES) -> Region:
    blocks = np.zeros((num_blocks, block_bytes), np.uint8)
    blocks[:] = np.arange(1, num_blocks + 1)[:, None] % 251
    return Region(blocks)


def empty(num_blocks: int, block_bytes: int = BLOCK_BYTES) -> Region:
    return Region(np.zeros((num_blocks, block_bytes), np.uint8))


def memory_of(owner: NixlOwner, *regions: Region, epoch: int = 1, name: str = "p") -> PeerMemory:
    descriptors = tuple(
        RegionDescriptor("", "", region.capacity_bytes, region.block_bytes) for region in regions
    )
    return PeerMemory(name, epoch, descriptors, (owner.endpoint,))


def address_in(memory: PeerMemory) -> NixlAddress:
    text = memory.endpoints[0].address
    return msgspec.msgpack.decode(base64.b64decode(text), type=NixlAddress)


def with_address(memory: PeerMemory, address: NixlAddress) -> PeerMemory:
    text = base64.b64encode(msgspec.msgpack.encode(address)).decode()
    return msgspec.structs.replace(memory, endpoints=(Endpoint("nixl", text),))


@pytest.fixture(params=["double", "nixl"])
def backend(request, monkeypatch):
    if request.param == "nixl":
        pytest.importorskip("nixl")
        return None
    agent = type("Agent", (DoubleAgent,), {"agents": {}})
    monkeypatch.setattr("penstock.transport.nixl.NixlAgent", agent)
    monkeypatch.setattr("penstock.transport.nixl_owner.NixlAgent", agent)
    return agent


@pytest.fixture
def way(backend):
    way = Nixl(silence_s=2.0)
    yield way
    way.close()


@pytest.fixture
def owner(backend):
    owner = NixlOwner(epoch=1)
    yield owner
    owner.close()


def test_blocks_land_where_they_belong(way, owner):
    small, large = region_of(64), region_of(8, 1 << 20)
    assert [owner.add(small), owner.add(large)] == [0, 1]
    memory = memory_of(owner, small, large)
    rng = np.random.default_rng(1)
    for index, region in enumerate((small, large)):
        source = way.open(memory, index)
        assert (source.name, source.num_blocks) == ("nixl", region.num_blocks)
        into = empty(region.num_blocks, region.block_bytes)
        order = rng.permutation(region.num_blocks)
        for half in np.array_split(order, 2):  # the second time everything is prepared
            source.pull(into, cut(half, order[half]))
        assert (into.blocks[order] == region.blocks).all()
    one, run = empty(64), np.arange(10, 40)
    way.open(memory, 0).pull(one, cut(run, run + 2))
    assert one.blocks[12:42].tobytes() == small.blocks[10:40].tobytes()
    assert not one.blocks[:12].any()
    assert not one.blocks[42:].any()


def test_regions_that_are_registered_later_are_read(way, owner):
    first, second = region_of(4), region_of(8)
    owner.add(first)
    into = empty(8)
    opened = way.open(memory_of(owner, first), 0)
    opened.pull(into, cut([1], [0]))
    owner.add(second)
    way.open(memory_of(owner, first, second), 1).pull(into, cut([7], [1]))
    opened.pull(into, cut([2], [2]))

    assert into.blocks[:4, 0].tolist() == [2, 8, 3, 0]


def test_a_peer_that_came_back_is_another(way, owner):
    region = region_of(4)
    owner.add(region)
    known = memory_of(owner, region)
    way.open(known, 0)
    way.forget("p", 1)

    with pytest.raises(PeerLost, match="another epoch"):
        way.open(memory_of(owner, region, epoch=2), 0)

    # The same memory at the same address, of somebody else: only the page tells.
    address = address_in(known)
    strange = msgspec.structs.replace(address, token=secrets.token_bytes(32))
    with pytest.raises(PeerLost, match="another epoch"):
        way.open(with_address(known, strange), 0)
    # What is right is not in the way of what was wrong.
    into = empty(4)
    way.open(known, 0).pull(into, cut([0], [0]))
    assert into.blocks[0, 0] == 1


def test_memory_that_is_not_registered_is_not_read(way, owner):
    region, secret = region_of(4), region_of(4)
    owner.add(region)
    memory = memory_of(owner, region)
    address = address_in(memory)
    elsewhere = msgspec.structs.replace(address, bases=(secret.address,))
    with pytest.raises(PeerLost, match="outside what is registered"):
        way.open(with_address(memory, elsewhere), 0)
    larger = msgspec.structs.replace(
        memory, regions=(RegionDescriptor("", "", 5 * BLOCK_BYTES, BLOCK_BYTES),)
    )
    with pytest.raises(PeerLost, match="outside what is registered"):
        way.open(larger, 0)
    with pytest.raises(PeerLost, match="serves 1 regions"):
        way.open(memory_of(owner, region, region), 1)


@pytest.mark.parametrize(
    "text",
    ["", "!", "AAAA", base64.b64encode(msgspec.msgpack.encode((b"x", 1, b"y", ()))).decode()],
)
def test_junk_is_no_address(way, text):
    memory = PeerMemory("p", 1, (RegionDescriptor("", "", 64, 64),), (Endpoint("nixl", text),))
    with pytest.raises(PeerLost, match="makes no sense"):
        way.open(memory, 0)
    with pytest.raises(PeerLost, match="serves no reads"):
        way.open(msgspec.structs.replace(memory, endpoints=()), 0)


def test_junk_is_no_metadata(way, owner):
    region = region_of(4)
    owner.add(region)
    memory = memory_of(owner, region)
    address = address_in(memory)
    whole = address.metadata
    for metadata in (b"", b"junk", whole[:-1], whole[: len(whole) // 2]):
        junk = msgspec.structs.replace(address, metadata=metadata)
        with pytest.raises(PeerLost):
            way.open(with_address(memory, junk), 0)
    way.open(memory, 0)


def test_who_is_forgotten_is_not_read(way, owner):
    region, into = region_of(4), empty(4)
    owner.add(region)
    memory = memory_of(owner, region)
    opened = way.open(memory, 0)
    way.forget("p", 2)
    opened.pull(into, cut([0], [0]))
    way.forget("p", 1)
    with pytest.raises(PeerLost, match="forgotten"):
        opened.pull(into, cut([1], [1]))
    assert into.blocks[:, 0].tolist() == [1, 0, 0, 0]
    way.open(memory, 0).pull(into, cut([1], [1]))
    way.close()
    with pytest.raises(PeerLost, match="forgotten"):
        way.open(memory, 0)


def test_several_threads_pull_at_once(way, owner):
    region = region_of(256)
    owner.add(region)
    source = way.open(memory_of(owner, region), 0)
    pools = [empty(256) for _ in range(4)]
    blocks = np.arange(256)

    def pull(into: Region) -> None:
        for _ in range(10):
            source.pull(into, cut(blocks, blocks[::-1]))

    threads = [threading.Thread(target=pull, args=(pool,)) for pool in pools]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((pool.blocks[::-1] == region.blocks).all() for pool in pools)


def test_what_was_pulled_into_long_ago_is_let_go_and_can_come_back(way, owner, monkeypatch):
    monkeypatch.setattr("penstock.transport.nixl.DESTINATIONS_MAX", 2)
    region = region_of(4)
    owner.add(region)
    source = way.open(memory_of(owner, region), 0)
    pools = [empty(4) for _ in range(4)]
    for block in range(4):
        for pool in pools:
            source.pull(pool, cut([block], [block]))
    assert all((pool.blocks == region.blocks).all() for pool in pools)


@pytest.mark.parametrize("backend", ["double"], indirect=True)
def test_a_silent_peer_has_a_deadline_and_the_agent_ends_with_it(backend, owner):
    region, into = region_of(4), empty(4)
    owner.add(region)
    way = Nixl(silence_s=0.05)
    source = way.open(memory_of(owner, region), 0)
    reader = way._reader
    backend.is_silent = True
    with pytest.raises(DeadlineExceeded, match="p was silent or slow"):
        source.pull(into, cut([1], [1]))
    with pytest.raises(PeerLost, match="p was silent or slow"):
        way.open(memory_of(owner, region), 0)
    assert len(backend.agents) == 1, "an agent whose reads are under way has not ended"
    backend.is_silent = False
    source.pull(into, cut([2], [2]))
    assert way._reader is not reader
    assert into.blocks[:, 0].tolist() == [0, 0, 3, 0]
    way.close()
    owner.close()
    assert not backend.agents
    backend.agents[owner._agent.name] = owner._agent  # the fixture closes it once more


@pytest.mark.parametrize("backend", ["double"], indirect=True)
def test_forgetting_and_closing_end_a_pull_that_is_under_way(backend, owner):
    region = region_of(4)
    owner.add(region)
    for end in (lambda way: way.forget("p", 1), lambda way: way.close()):
        way = Nixl(silence_s=60.0)
        source = way.open(memory_of(owner, region), 0)
        backend.is_silent = True
        errors = []

        def pull(source=source, errors=errors) -> None:
            try:
                source.pull(empty(4), cut([0], [0]))
            except PeerLost as error:
                errors.append(str(error))

        thread = threading.Thread(target=pull)
        thread.start()
        while not way._lock.locked():
            time.sleep(0.001)
        end(way)
        thread.join(20)
        backend.is_silent = False
        assert errors == ["p: p was forgotten"]


def test_two_peers_are_not_one_agent(way, owner):
    region = region_of(4)
    owner.add(region)
    way.open(memory_of(owner, region), 0)
    with pytest.raises(PeerLost, match="metadata of another peer"):
        way.open(memory_of(owner, region, name="q"), 0)


def on_gpu(region: Region, device: int = 3) -> CudaRegion:
    """Return memory as the double takes it for a GPU's."""
    return CudaRegion(device, region.address, region.num_blocks, region.block_bytes)


@pytest.mark.parametrize("is_source_on_gpu", [True, False])
@pytest.mark.parametrize("is_destination_on_gpu", [True, False])
def test_blocks_of_gpus_and_the_page_behind_them(
    monkeypatch, is_source_on_gpu, is_destination_on_gpu
):
    agent = type("Agent", (DoubleAgent,), {"agents": {}})
    monkeypatch.setattr("penstock.transport.nixl.NixlAgent", agent)
    monkeypatch.setattr("penstock.transport.nixl_owner.NixlAgent", agent)
    theirs, ours, owner = region_of(8), empty(6), NixlOwner(1)
    owner.add(on_gpu(theirs) if is_source_on_gpu else theirs)
    memory = memory_of(owner, theirs)
    assert address_in(memory).device(0) == (3 if is_source_on_gpu else None)
    way = Nixl()
    source = way.open(memory, 0)
    into = on_gpu(ours, 5) if is_destination_on_gpu else ours
    source.pull(into, cut([6, 1, 2], [0, 3, 4]))
    assert ours.blocks[:, 0].tolist() == [7, 0, 0, 2, 3, 0]
    # The owner came back: its page says so, though blocks are read before it.
    owner._page.blocks[:] = 0
    with pytest.raises(PeerLost, match="another epoch"):
        source.pull(into, cut([0], [0]))
    way.close()
    owner.close()
