"""Compression engine: lanes, order, and the books."""

from penstock.core.events import MoveClass
from penstock.kv.compression import CompressionEngine, Direction, Job
from penstock.kv.tiers import CodecSpec, Tier

INT8 = CodecSpec(name="int8", block_bytes=50, encode_ns=30, decode_ns=20)


def job(key: str, kind=MoveClass.ONBOARD, deadline_ns=0, direction=Direction.DECODE) -> Job:
    return Job(key, Tier.HBM, INT8, direction, kind, deadline_ns)


def test_the_most_urgent_goes_first_on_every_free_lane():
    engine = CompressionEngine(num_lanes=2)
    for each in [
        job("write", MoveClass.OFFLOAD, direction=Direction.ENCODE),
        job("late", deadline_ns=9),
        job("soon", deadline_ns=1),
        job("prefetch", MoveClass.PREFETCH),
    ]:
        engine.submit(each)
    assert engine.ahead_ns() == (30 + 3 * 20) / 2
    soon, late = engine.start(0)
    assert (soon.key, late.key) == ("soon", "late")
    assert engine.start(5) == []
    assert engine.num_waiting == 2
    engine.finish(soon, 20)
    (prefetch,) = engine.start(20)
    assert prefetch.key == "prefetch"
    engine.finish(late, 20)
    (write,) = engine.start(20)
    assert write.duration_ns == 30
    engine.finish(write, 50)
    engine.finish(prefetch, 40)
    assert engine.books.num_done == {Direction.DECODE: 3, Direction.ENCODE: 1}
    assert engine.books.busy_ns == {Direction.DECODE: 60, Direction.ENCODE: 30}
    assert engine.ahead_ns() == 0
    assert engine.start(60) == []
