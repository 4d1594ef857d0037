"""What a codec costs here: one block's bytes and times, as the orchestrator weighs them.

Owns the measurement on blocks that it is given. Does not know the model's quality: the loss comes
in, from `penstock/kv/quality.py`. Called where a worker starts, once for each codec admitted.
"""

from time import thread_time_ns
from typing import Final

import numpy as np

from penstock.codec.codec import Bytes2D, Codec
from penstock.kv.tiers import CodecSpec

_RUNS: Final = 5


def price(codec: Codec, blocks: Bytes2D, *, loss: float) -> CodecSpec:
    """Return a codec's description, its times being medians over some runs on this thread.

    `blocks` [n, block_bytes] are samples of KV, and stay as they are: what a lossless codec makes
    of other content says nothing, so without any, give what was computed for the probe. Of a
    lossless codec `block_bytes` is the mean of the samples; memory must be had for
    `Codec.encoded_bytes`. Takes a few milliseconds per MiB.
    """
    assert len(blocks), "no block to measure on"
    assert loss > 0 or codec.is_lossless, (codec.name, loss)
    encoded = np.zeros((len(blocks), codec.encoded_bytes), np.uint8)
    landed, ids = np.zeros_like(blocks), range(len(blocks))
    encode_ns, decode_ns = [], []
    # The first run pays for fresh pages, and is not counted.
    for _ in range(_RUNS + 1):
        started_ns = thread_time_ns()
        lengths = codec.encode(blocks, ids, encoded)
        encoded_ns = thread_time_ns()
        codec.decode(encoded, landed, ids)
        encode_ns.append(encoded_ns - started_ns)
        decode_ns.append(thread_time_ns() - encoded_ns)
    return CodecSpec(
        name=codec.name,
        block_bytes=-int(-lengths.mean() // 1),
        encode_ns=_of_one(encode_ns[1:], len(blocks)),
        decode_ns=_of_one(decode_ns[1:], len(blocks)),
        loss=loss,
    )


def _of_one(times_ns: list[int], num_blocks: int) -> int:
    return max(1, round(float(np.median(times_ns)) / num_blocks))
