"""Tokens pulled between agents with pools of different shapes, against writing them singly."""

import itertools
from contextlib import ExitStack

import numpy as np
import pytest
from msgspec.structs import replace

from penstock.core.errors import BadRequest, BlocksCorrupt, PeerLost
from penstock.core.events import Reshape
from penstock.core.messages import GroupBlocks
from penstock.transfer.region import Region
from penstock.transfer.reshape import plan_reshape
from penstock.transport import Agent, reshape
from penstock.transport.native import library
from penstock.transport.reshape import Reshaper
from penstock.transport.shm import MappedPool
from tests.transfer.shapes import (
    GROUPS,
    NUM_BLOCKS,
    UNTOUCHED,
    WHOLE,
    content_of,
    empty_pool,
    shard,
    table,
    with_digests,
    write,
)

KEY = bytes(range(32))
SIZES = (16, 32, 64, 128)
DEGREES = (1, 2, 4)
NUM_TOKENS = 150
TOKENS = ((0, 150), (0, 128), (21, 130), (48, 49), (16, 160), (37, 111))


class Cluster:
    """Agents for every shape that is asked for, those that give filled with the same content."""

    def __init__(self, transport):
        self.transport = transport
        self.agents = {}
        self.stack = ExitStack()
        self.content = [content_of(512, group) for group in range(len(GROUPS))]

    def giver(self, layout):
        if ("giver", layout) not in self.agents:
            agent, pools = self._agent("auto", layout)
            rng = np.random.default_rng(layout.block_size)
            offered = []
            for group, region in enumerate(pools):
                blocks = table(rng, layout, 0, 160)
                held = range(len(blocks.block_ids) * layout.block_size)
                write(region.blocks, layout, blocks, self.content[group], held)
                offered.append(with_digests(region.blocks, blocks))
            self.agents["giver", layout] = agent, pools, offered
        return self.agents["giver", layout]

    def taker(self, layout):
        if ("taker", layout) not in self.agents:
            self.agents["taker", layout] = self._agent(self.transport, layout)
        return self.agents["taker", layout]

    def _agent(self, transport, layout):
        agent = self.stack.enter_context(Agent(key=KEY, transport=transport, layout=layout))
        pools = [agent.allocate(NUM_BLOCKS, size) for size in layout.block_bytes]
        for region in pools:
            region.blocks[:] = UNTOUCHED
        return agent, pools


@pytest.fixture(scope="module", params=["shm", "tcp"])
def cluster(request):
    cluster = Cluster(request.param)
    with cluster.stack:
        yield cluster


def check(cluster, theirs_of, ours, group, tokens):
    """Fill a pool from every shard of the peers' group that has heads of ours."""
    agent, pools = cluster.taker(ours)
    rng = np.random.default_rng((*tokens, ours.block_size))
    into, expected = pools[group], empty_pool(ours, group)
    into.blocks[:] = UNTOUCHED
    our_blocks = table(rng, ours, *tokens)
    for theirs in theirs_of:
        if set(theirs.kv_heads) & set(ours.kv_heads):
            giver, _, offered = cluster.giver(theirs)
            wanted = Reshape(offered[group], our_blocks, *tokens)
            peer = agent.connect(giver.descriptor())
            pulled = agent.pull_tokens(peer, wanted, into, group=group)
            assert pulled.transport == cluster.transport
    write(expected, ours, our_blocks, cluster.content[group], range(*tokens))
    if ours in theirs_of and tokens[0] % ours.block_size == 0:
        # Copied as they are: with what the peer has behind the last token.
        end = -(-tokens[1] // ours.block_size) * ours.block_size
        write(expected, ours, our_blocks, cluster.content[group], range(tokens[1], end))
    assert (into.blocks == expected).all()


@pytest.mark.parametrize("ours_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("theirs_dtype", ["float32", "bfloat16", "float16"])
def test_every_block_size_dtype_and_degree(cluster, theirs_dtype, ours_dtype):
    shapes = itertools.product(SIZES, SIZES, DEGREES, DEGREES, range(len(GROUPS)))
    for number, (theirs_size, ours_size, theirs_degree, degree, group) in enumerate(shapes):
        theirs = [shard(theirs_degree, r, theirs_size, theirs_dtype) for r in range(theirs_degree)]
        ours = shard(degree, number % degree, ours_size, ours_dtype)
        check(cluster, theirs, ours, group, TOKENS[number % len(TOKENS)])


def test_a_flipped_byte_is_caught_before_it_is_cut(cluster):
    theirs, ours = shard(1, 0, 16, "bfloat16"), shard(1, 0, 64, "float32")
    giver, pools, offered = cluster.giver(theirs)
    agent, our_pools = cluster.taker(ours)
    our_pools[0].blocks[:] = UNTOUCHED
    peer = agent.connect(giver.descriptor())
    wanted = Reshape(offered[0], GroupBlocks(0, (3, 4, 5)), 0, 150)
    pools[0].blocks[offered[0].block_ids[2], 77] ^= 1

    with pytest.raises(BlocksCorrupt):
        agent.pull_tokens(peer, wanted, our_pools[0])

    assert (our_pools[0].blocks == UNTOUCHED).all()
    pools[0].blocks[offered[0].block_ids[2], 77] ^= 1
    agent.pull_tokens(peer, wanted, our_pools[0])


def test_a_flipped_byte_of_the_same_shape_is_caught_too(cluster):
    layout = shard(1, 0, 16, "float32")
    giver, pools, offered = cluster.giver(layout)
    agent, our_pools = cluster.taker(layout)
    wanted = Reshape(offered[0], GroupBlocks(0, tuple(range(10))), 0, 150)
    pools[0].blocks[offered[0].block_ids[9], 0] ^= 1

    with pytest.raises(BlocksCorrupt):
        agent.pull_tokens(agent.connect(giver.descriptor()), wanted, our_pools[0])

    pools[0].blocks[offered[0].block_ids[9], 0] ^= 1


def test_a_peer_that_does_not_go_together_with_us_is_refused_at_connect(cluster):
    agent, _ = cluster.taker(WHOLE)
    other = replace(WHOLE, model="m at another revision", block_size=32)
    with (
        Agent("stranger", key=KEY, layout=other) as stranger,
        pytest.raises(BadRequest) as refusal,
    ):
        agent.connect(stranger.descriptor())
    for said in ("stranger", WHOLE.fingerprint(), other.fingerprint(), "model is"):
        assert said in str(refusal.value)


def test_agents_without_a_layout_pull_no_tokens(cluster):
    agent, pools = cluster.taker(WHOLE)
    wanted = Reshape(GroupBlocks(0, (0,)), GroupBlocks(0, (0,)), 0, 16)
    with Agent(key=KEY) as plain:
        peer = agent.connect(plain.descriptor())
        with pytest.raises(BadRequest, match="layout"):
            agent.pull_tokens(peer, wanted, pools[0])


def test_blocks_that_are_none_are_refused_before_a_byte_is_moved(cluster):
    theirs = shard(1, 0, 16, "float32")
    giver, _, _ = cluster.giver(theirs)
    for ours in (shard(1, 0, 32, "float32"), theirs):
        agent, pools = cluster.taker(ours)
        pools[0].blocks[:] = UNTOUCHED
        peer = agent.connect(giver.descriptor())
        for source, destination in ((NUM_BLOCKS, 0), (0, NUM_BLOCKS), (-1, 0), (0, -1), (2**63, 0)):
            wanted = Reshape(GroupBlocks(0, (0, source)), GroupBlocks(0, (0, destination)), 0, 32)
            if ours is not theirs and not source:
                wanted = Reshape(GroupBlocks(0, (0, 1)), GroupBlocks(0, (destination,)), 0, 32)
            with pytest.raises(BadRequest):
                agent.pull_tokens(peer, wanted, pools[0])
        with pytest.raises(BadRequest, match="group"):
            agent.pull_tokens(peer, wanted, pools[0], group=2)
        with pytest.raises(BadRequest, match="bytes"):
            agent.pull_tokens(peer, Reshape(wanted.source, wanted.source, 0, 16), pools[1])
        assert (pools[0].blocks == UNTOUCHED).all()


def random_pool(layout, seed):
    rng = np.random.default_rng(seed)
    return Region(rng.integers(0, 256, (NUM_BLOCKS, layout.block_bytes[0]), np.uint8))


@pytest.mark.parametrize("ours_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("theirs_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [3, 512])
def test_native_and_numpy_agree_on_any_bits(theirs_dtype, ours_dtype, head_dim, monkeypatch):
    """Subnormal numbers, infinities, ties; of what is no number only that it is none."""
    theirs = replace(shard(2, 1, 16, theirs_dtype), head_dim=head_dim)
    ours = replace(shard(1, 0, 32, ours_dtype), head_dim=head_dim)
    wanted = Reshape(GroupBlocks(0, (3, 9, 1, 2)), GroupBlocks(0, (5, 6)), 3, 61)
    plan = plan_reshape(theirs, ours, 0, wanted)
    results = []
    for load in (library.load_library, lambda: None):
        monkeypatch.setattr(reshape, "load_library", load)
        into = Region(np.zeros((NUM_BLOCKS, ours.block_bytes[0]), np.uint8))
        Reshaper().carry_out(plan, MappedPool(random_pool(theirs, 1)), into)
        results.append(into.blocks[[5, 6]])
    assert library.load_library() is not None, "nothing was compared"
    if theirs_dtype == ours_dtype:
        assert (results[0] == results[1]).all()
        return
    native, plain = (numbers(result, ours_dtype) for result in results)
    is_number = ~np.isnan(plain)
    assert is_number.mean() > 0.9
    assert (native == plain)[is_number].all()
    assert np.isnan(native[~is_number]).all()


def numbers(blocks, dtype):
    if dtype == "bfloat16":
        return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return blocks.view(dtype)


@pytest.mark.parametrize("staging_bytes", [1, 5000, 1 << 20])
def test_staging_memory_bounds_what_is_read_at_once(staging_bytes):
    theirs, ours = shard(1, 0, 16, "float32"), shard(1, 0, 64, "float32")
    source = random_pool(theirs, 1)
    wanted = Reshape(GroupBlocks(0, (4, 5, 6, 7, 1, 2)), GroupBlocks(0, (8, 0)), 5, 90)
    plan = plan_reshape(theirs, ours, 0, wanted)
    results = []
    for size in (staging_bytes, 1 << 24):
        into = Region(empty_pool(ours))
        largest = Largest(source)
        Reshaper(size).carry_out(plan, largest, into)
        assert largest.num_bytes <= max(size, theirs.block_bytes[0])
        results.append(into.blocks)
    assert (results[0] == results[1]).all()


class Largest(MappedPool):
    """A mapped pool that remembers the largest pull."""

    num_bytes = 0

    def pull(self, destination, spans):
        self.num_bytes = max(self.num_bytes, int(spans[:, 2].sum()) * self.block_bytes)
        super().pull(destination, spans)


def test_a_peer_that_is_gone_is_lost(cluster):
    ours = shard(1, 0, 32, "float32")
    agent, pools = cluster.taker(ours)
    with Agent("brief", key=KEY, layout=WHOLE) as brief:
        brief.allocate(4, WHOLE.block_bytes[0])
        peer = agent.connect(brief.descriptor())
    wanted = Reshape(GroupBlocks(0, (0, 1)), GroupBlocks(0, (0,)), 0, 32)
    with pytest.raises(PeerLost):
        agent.pull_tokens(peer, wanted, pools[0])
