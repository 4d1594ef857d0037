"""Messages cross the wire unchanged, and junk does not get in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.block import KVGroup, KVLayout
from penstock.core.descriptors import RegionDescriptor, TierRegion, WorkerInfo
from penstock.core.links import AskTime, Link, LinksTried, TellTime, TryLinks, WayTried
from penstock.core.messages import (
    WIRE_ERRORS,
    Assign,
    GroupBlocks,
    Hello,
    Message,
    Offer,
    RequestFailed,
    TokenOutput,
    Tokens,
    decode_message,
    encode_message,
)
from penstock.core.request import Request, SamplingParams, Timeline
from penstock.core.residency import PlacedBlock, PoolResidency, Survey, Surveyed, TierResidency
from penstock.core.step import TokenLogprobs
from penstock.core.tiers import KeptBlock, ShelfChanged, ShelfUsed, TierLoad
from penstock.core.types import BlockHash, BlockId, Digest, FinishReason, RequestId, Role, WorkerId

REQUEST = Request(
    request_id=RequestId("r"),
    prompt_token_ids=(1, 2, 3),
    params=SamplingParams(temperature=0.5, seed=2**63, stop=("x",), logit_bias=((3, -1.5),)),
    output_token_ids=(9,),
    cache_salt="t",
)
MESSAGES: list[Message] = [
    Assign(request=REQUEST, decode_worker=WorkerId("d"), timeline=Timeline(arrived_ns=5)),
    Offer(
        request=REQUEST,
        source=WorkerId("p"),
        epoch=3,
        num_tokens=3,
        num_ready=3,
        groups=(GroupBlocks(0, (BlockId(4), BlockId(5)), (Digest(2**64 - 1), Digest(1)), (1, 9)),),
        runs=((2,),),
        timeline=Timeline(offered_ns=1, prefill_worker="p"),
        lease_ns=5,
    ),
    Tokens(
        worker_id=WorkerId("d"),
        outputs=(
            TokenOutput(
                RequestId("r"),
                (7,),
                (TokenLogprobs(-0.1, ((7, -0.1), (8, -3.0))),),
                FinishReason.STOP,
                Timeline(first_token_ns=2),
            ),
        ),
    ),
    Hello(
        info=WorkerInfo(
            worker_id=WorkerId("p"),
            role=Role.PREFILL,
            epoch=1,
            address="ipc://x",
            pid=1,
            layout=KVLayout("m", (KVGroup((0, 1)), KVGroup((2,), 64)), 2, 64, 32, "bfloat16"),
            num_blocks=(10, 5),
            max_model_len=100,
            max_num_seqs=4,
            regions=(RegionDescriptor("shm", "1:2", 100, 10),),
            tiers=(TierRegion("disk", "disk", RegionDescriptor("disk", "/x/p.kv", 100, 10)),),
        )
    ),
    ShelfChanged(
        worker_id=WorkerId("p"),
        epoch=2,
        tier="dram",
        stored=(KeptBlock(3, BlockHash(b"n" * 16), Digest(2**64 - 1)),),
        removed=(BlockHash(b"m" * 16),),
        is_all=True,
    ),
    ShelfUsed(epoch=2, tier="dram", wrong=(KeptBlock(3, BlockHash(b"n" * 16), Digest(1)),)),
    RequestFailed(request_id=RequestId("r"), reason="why", is_retryable=True),
    Survey(number=1, limit=2, start=(1, 5), request_ids=(RequestId("r"),), name="3fa9"),
    Surveyed(
        number=1,
        worker_id=WorkerId("d"),
        epoch=2,
        pools=(PoolResidency(0, 8, 3, 2, 3, 2, 4096, "raw", 1),),
        tiers=(TierResidency(TierLoad("dram", 4, 1), "raw", 4096, 1, 0),),
        blocks=(
            PlacedBlock("device", 0, 3, "cached", None, "raw", "hot", 4096, 0, "to dram", 5, 6),
        ),
        next=(1, 5),
    ),
    TryLinks(number=1, moved_bytes=2),
    LinksTried(
        number=1,
        worker_id=WorkerId("d"),
        fingerprint="aa",
        links=(
            Link(
                owner=WorkerId("p"),
                fingerprint="bb",
                incompatibility="another model",
                ways=(WayTried(kind="tcp", name="tcp", is_used=True, bytes_per_s=1.5),),
                skew_ns=-3,
                skew_within_ns=4,
            ),
        ),
    ),
    AskTime(worker_id=WorkerId("d"), asked_ns=1),
    TellTime(worker_id=WorkerId("p"), asked_ns=1, answered_ns=2),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_survive_the_wire(message: Message) -> None:
    assert decode_message(encode_message(message)) == message


@given(st.binary(max_size=300))
def test_junk_is_refused_as_such(junk: bytes) -> None:
    with pytest.raises(WIRE_ERRORS):
        decode_message(junk)


def test_nesting_without_end_is_refused() -> None:
    with pytest.raises(WIRE_ERRORS):
        decode_message(b"\x82\xa4type\xa6Cancel\xa1x" + b"\x91" * 100_000)


@given(st.integers(0, len(MESSAGES) - 1), st.data())
def test_a_damaged_message_is_refused_or_still_a_message(index: int, data: st.DataObject) -> None:
    frame = bytearray(encode_message(MESSAGES[index]))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        message = decode_message(bytes(frame))
    except WIRE_ERRORS:
        return
    assert decode_message(encode_message(message)) == message


def test_capacity_counts_the_full_attention_group() -> None:
    hello = MESSAGES[3]
    assert isinstance(hello, Hello)
    assert hello.info.capacity_tokens == 10 * 32
