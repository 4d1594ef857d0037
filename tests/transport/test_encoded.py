"""Blocks that cross a TCP connection encoded: what comes out, and that nothing wrong comes out."""

import numpy as np
import pytest

from penstock.codec.codec import make_codec
from penstock.core.block import KVGroup, KVLayout
from penstock.core.descriptors import RegionDescriptor, WorkerInfo
from penstock.core.events import Move, MoveClass
from penstock.core.types import BlockId, Role
from penstock.transfer.digest import take_digests
from penstock.transfer.generation import COUNTER_BYTES
from penstock.transfer.plan import align
from penstock.transfer.region import PeerMemory, Region
from penstock.transport.encoded import ROWS, EncodedReader, encode_rows, row_bytes
from penstock.transport.mover import BlockMover
from penstock.transport.shm import SharedMemory, SharedPool
from penstock.transport.tcp import Tcp
from penstock.transport.tcp_owner import TcpOwner
from penstock.transport.verify import verified

KEY = bytes(range(32))
EPOCH = 7
LAYOUT = KVLayout(
    model="m", dtype="bfloat16", block_size=16, num_kv_heads=2, head_dim=32,
    groups=(KVGroup((0, 1), 0),),
)  # fmt: skip
NUM_BLOCKS = 700
(BLOCK_BYTES,) = LAYOUT.block_bytes


def kv(num_blocks: int, seed: int) -> np.ndarray:
    """Return numbers as keys and values are: finite bfloat16."""
    numbers = np.random.default_rng(seed).normal(size=num_blocks * BLOCK_BYTES // 2)
    bits = (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return bits.view(np.uint8).reshape(num_blocks, BLOCK_BYTES)


class Pair:
    """An owner that serves its pool plain and in a codec, and a mover that reads it."""

    def __init__(self, codec: str, *, reads: str = "", ways: list | None = None) -> None:
        self.pool = SharedPool(NUM_BLOCKS, BLOCK_BYTES)
        self.pool.region.blocks[:] = kv(NUM_BLOCKS, 1)
        self.counters = SharedPool(NUM_BLOCKS, COUNTER_BYTES)
        self.codec = make_codec(codec, LAYOUT)
        self.owner = TcpOwner(EPOCH, KEY)
        assert [self.owner.add(p.region) for p in (self.pool, self.counters)] == [0, 1]
        assert self.owner.add_encoded(0, self.codec) == 2
        self.ours = Region(np.zeros((NUM_BLOCKS, BLOCK_BYTES), np.uint8))
        reader = EncodedReader(make_codec(reads or codec, LAYOUT))
        self.ways = [Tcp(KEY)] if ways is None else ways
        mover = BlockMover(LAYOUT, [self.ours], self.ways, readers=[reader])
        width = row_bytes(self.codec)
        rows = RegionDescriptor(ROWS, codec, NUM_BLOCKS * width, width)
        mover.add_peer(
            WorkerInfo(
                worker_id="p",
                role=Role.PREFILL,
                epoch=EPOCH,
                address="",
                pid=0,
                layout=LAYOUT,
                num_blocks=(NUM_BLOCKS,),
                max_model_len=1024,
                max_num_seqs=1,
                regions=(self.pool.descriptor, self.counters.descriptor, rows),
                endpoints=(self.owner.endpoint,),
            )
        )
        self.execute = verified(mover.execute, [self.ours])

    def close(self) -> None:
        for way in self.ways:
            way.close()
        self.owner.close()
        self.pool.close()
        self.counters.close()

    def move(self, sources: list[int], codec: str = "int8", **changes: object) -> Move:
        ids = [BlockId(i) for i in sources]
        spans = tuple(align(ids, [BlockId(i) for i in range(len(ids))]))
        fields = {
            "digests": (take_digests(self.pool.region.blocks, ids),),
            "generations": ((0,) * len(ids),),
            **changes,
        }
        return Move(
            move_id=1, kind=MoveClass.HANDOFF, request_id="r", source="p", epoch=EPOCH,
            spans=(spans,), codec=codec, **fields,
        )  # fmt: skip


@pytest.fixture
def make_pair(implementation):
    pairs: list[Pair] = []

    def make(*args, **kwargs) -> Pair:
        pairs.append(Pair(*args, **kwargs))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.close()


@pytest.mark.parametrize("codec", ["int8", "int4", "fp8"])
def test_blocks_come_out_as_the_codec_leaves_them(make_pair, codec):
    pair = make_pair(codec)
    sources = [5, 6, 7, 2, 600, *range(100, 520)]
    done = pair.execute(pair.move(sources, codec))
    assert (done.error, done.is_corrupt) == (None, False)
    assert done.transport.endswith(f" {codec}")
    assert done.codec == codec
    assert done.transport.startswith("tcp")
    encoded = np.zeros((len(sources), pair.codec.encoded_bytes), np.uint8)
    pair.codec.encode(pair.pool.region.blocks, sources, encoded)
    expected = np.zeros((len(sources), BLOCK_BYTES), np.uint8)
    pair.codec.decode(encoded, expected, range(len(sources)))
    assert np.array_equal(pair.ours.blocks[: len(sources)], expected)
    assert done.digests == (take_digests(expected, map(BlockId, range(len(sources)))),)
    assert done.num_bytes == len(sources) * row_bytes(pair.codec) < len(sources) * BLOCK_BYTES
    assert done.codec_ns > 0


def test_rows_are_the_same_from_either_server(make_pair):
    pair = make_pair("int8")
    ids = [3, 4, 5, 9]
    rows = Region(np.zeros((len(ids), row_bytes(pair.codec)), np.uint8))
    source = pair.ways[0].open(_memory(pair), 2)
    source.pull(rows, np.array([[3, 0, 3], [9, 3, 1]], np.int64))
    assert np.array_equal(rows.blocks, encode_rows(pair.codec, pair.pool.region, ids))


def _memory(pair: Pair):
    width = row_bytes(pair.codec)
    rows = RegionDescriptor(ROWS, "int8", NUM_BLOCKS * width, width)
    described = (pair.pool.descriptor, pair.counters.descriptor, rows)
    return PeerMemory("p", EPOCH, described, (pair.owner.endpoint,))


def test_what_has_changed_since_the_offer_is_corrupt(make_pair):
    pair = make_pair("int8")
    move = pair.move([1, 2, 3])
    pair.pool.region.blocks[2, 17] ^= 1
    done = pair.execute(move)
    assert (done.error, done.is_corrupt) == (None, True)
    assert not pair.ours.blocks.any()  # nothing was decoded


def test_what_was_handed_out_anew_is_stale(make_pair):
    pair = make_pair("int8")
    move = pair.move([1, 2], generations=((0, 1),))
    done = pair.execute(move)
    assert done.is_stale
    assert done.error


def test_a_bit_that_flips_on_the_way_is_corrupt(make_pair):
    pair = make_pair("int8")
    rows = encode_rows(pair.codec, pair.pool.region, [4])
    offered = take_digests(pair.pool.region.blocks, [BlockId(4)])
    flips = [0, pair.codec.encoded_bytes // 2, rows.shape[1] - 16, rows.shape[1] - 1]
    for at in flips:

        class Wire:
            def pull(self, destination, spans, at=at):
                destination.blocks[0] = rows[0]
                destination.blocks[0, at] ^= 4

        reader = EncodedReader(pair.codec)
        with pytest.raises(Exception, match="not the one that was offered"):
            reader.pull(Wire(), pair.ours, np.array([[0, 0, 1]], np.int64), offered)
    assert not pair.ours.blocks.any()


def test_without_rows_of_that_codec_blocks_cross_as_they_are(make_pair):
    for pair, codec in (
        (make_pair("int4", reads="int8"), "int8"),  # the peer has others
        (make_pair("int8", ways=[SharedMemory(), Tcp(KEY)]), "int8"),  # no wire between them
    ):
        done = pair.execute(pair.move([8, 9], codec))
        assert (done.error, done.is_corrupt) == (None, False)
        assert "int" not in done.transport
        assert done.codec == "raw"
        assert np.array_equal(pair.ours.blocks[:2], pair.pool.region.blocks[8:10])
        assert done.digests == ()
