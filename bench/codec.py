"""What the KV codecs give: bytes, speed on one core, error, and what they cost a model.

Speed: 112 MiB of KV in blocks of the Qwen3-0.6B shape (28 layers, 8 KV heads of 128, 32 tokens,
bf16: 3.5 MiB each), more than the caches hold, through the public `Codec` in turns with memcpy; and
8 small blocks (the built-in model's, 80 KiB) that stay in the cache. Rates are GB/s of raw bytes
per second of processor time, so that other work on the machine does not count. A ceiling is a bare
loop that reads and stores as many bytes as the codec and computes nothing. Where the zstandard
package is installed, lossless is set beside it: the same bytes split off and given to zstd.

Size and error: real KV, which the built-in model computed of held-out text, fp32 and bf16.

Quality: the built-in model reads held-out files (those of the interpreter's library that its
training never saw), each block of KV going through the codec as soon as it is full: the relative
increase of the loss, and at how many positions the most likely token stays the same. The same with
all KV as it is and a window of it alone, as with `kv_window` in a request. Then of the files that
are long enough what comes after a prompt of 1,024 tokens, once behind a window and once with as
many tokens of the prompt, chosen by what its end looks at, as with `kv_select`.

    python bench/codec.py [--quick] [--only speed|quality] [--output FILE]
"""

import argparse
import ctypes
import hashlib
import mmap
import sys
import time
from collections.abc import Callable
from ctypes import CDLL, c_int64, c_void_p
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from report import Report
from tiny_corpus import read_corpus
from tokenizers import Tokenizer

from penstock.codec.codec import CODECS, Codec, make_codec
from penstock.codec.native.library import load_library
from penstock.core.block import KVGroup, KVLayout
from penstock.core.config import EngineConfig
from penstock.engine.kv_quality import Bytes2D, Part, compare, read_texts
from penstock.engine.loading import load_model
from penstock.engine.model import LoadedModel
from penstock.native.build import Recipe, build
from penstock.runtime.codecs import round_trip_of
from penstock.transfer.reshape import convert

try:
    import zstandard
except ImportError:
    zstandard = None

NATIVE = Path(__file__).parent / "native"
STREAM_FROM = 4 << 20
"""Bytes from which the codecs store what they decode around the cache (`codec.cpp`)."""
MODEL = Path(__file__).parents[1] / "penstock" / "builtin" / "penstock-tiny"
BLOCK_SIZE = 32
LARGE = KVLayout("bench", (KVGroup(tuple(range(28))),), 8, 128, BLOCK_SIZE, "bfloat16")
LARGE_BLOCKS = 32
SMALL_BLOCKS = 8
TARGETS = {
    "int8_encode_gbps": 5.0,
    "int8_decode_gbps": 15.0,
    "int4_encode_gbps": 5.0,
    "int4_decode_gbps": 15.0,
}
LOSS_TARGETS = {"int8": 0.1, "int4": 1.0}
"""Percent."""
WINDOWS = (256, 512, 1024)
"""Tokens of the KV that are seen, beside the first block."""
PROMPT_TOKENS = 1024
"""What comes after them is judged where a part of a prompt is kept."""
PARTS = (128, 256, 512)
"""Tokens of the prompt that are kept, as a window and as a selection."""


def load(dtype: str) -> LoadedModel:
    """Load the built-in model."""
    config = EngineConfig(model=str(MODEL), dtype=dtype, block_size=BLOCK_SIZE)
    return load_model(config, lambda *_: None)


def held_out(num_files: int, num_tokens: int) -> list[list[int]]:
    """Return the beginnings of files that the model has never seen, as token ids."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    texts = sorted(
        (module.text for module in read_corpus().held_out),
        key=lambda text: hashlib.sha256(text.encode()).digest(),
    )
    return [
        tokenizer.encode(f"<|endoftext|>{text}").ids[: num_tokens + 1] for text in texts[:num_files]
    ]


def real_kv(model: LoadedModel, texts: list[list[int]]) -> Bytes2D:
    """Return the KV that a model computes of texts, [num_blocks, block_bytes]."""
    kept: list[Bytes2D] = []
    read_texts(model, texts, lambda _, blocks: kept.append(blocks.copy()), block_size=BLOCK_SIZE)
    return np.concatenate(kept)


@dataclass(frozen=True)
class Work:
    """Blocks to encode and decode, all pages touched."""

    codec: Codec
    pool: Bytes2D
    landed: Bytes2D
    encoded: Bytes2D

    def encode(self) -> None:
        """Encode every block."""
        self.codec.encode(self.pool, range(len(self.pool)), self.encoded)

    def decode(self) -> None:
        """Decode every block."""
        self.codec.decode(self.encoded, self.landed, range(len(self.pool)))


def pages(shape: tuple[int, int]) -> Bytes2D:
    """Return memory that begins with a page, all of it touched, as a worker's pool does: what is
    decoded into more than the cache holds is stored past it, by whole lines.
    """
    blocks = np.frombuffer(mmap.mmap(-1, shape[0] * shape[1]), np.uint8).reshape(shape)
    blocks[:] = 1
    return blocks


def copy(to: Bytes2D, blocks: Bytes2D) -> None:
    """Copy blocks with the C library's memcpy."""
    ctypes.memmove(to.ctypes.data, blocks.ctypes.data, blocks.nbytes)


def make_work(name: str, layout: KVLayout, pool: Bytes2D) -> Work:
    """Return work that has been done once."""
    codec = make_codec(name, layout)
    encoded = np.ones((len(pool), codec.encoded_bytes), np.uint8)
    work = Work(codec, pool, pages(pool.shape), encoded)
    work.encode()
    work.decode()
    return work


def rate(num_bytes: int, act: Callable[[], object], repetitions: int = 1) -> float:
    """Return GB/s of processor time."""
    started = time.thread_time_ns()
    for _ in range(repetitions):
        act()
    return repetitions * num_bytes / max(1, time.thread_time_ns() - started)


def measure_speed(report: Report, kv: Bytes2D, layout: KVLayout, runs: int) -> None:
    """Time every codec in turns with memcpy, from memory and from the cache."""
    block_bytes = LARGE.block_bytes[0]
    pool = np.resize(kv.reshape(-1), LARGE_BLOCKS * block_bytes).reshape(LARGE_BLOCKS, block_bytes)
    small = np.ascontiguousarray(kv[:SMALL_BLOCKS])
    for suffix, shape, blocks, repetitions in (
        ("", LARGE, pool, 1),
        ("_cached", layout, small, 40),
    ):
        acts = acts_on(shape, blocks)
        rates: dict[str, list[float]] = {key: [] for key in acts}
        for _ in range(runs):
            for key, act in acts.items():
                rates[key].append(rate(blocks.nbytes, act, repetitions))
        for key, found in rates.items():
            report.add(f"{key}{suffix}_gbps", found, "GB/s")


def acts_on(layout: KVLayout, blocks: Bytes2D) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    landed = pages(blocks.shape)
    acts: dict[str, Callable[[], object]] = {"memcpy": lambda: copy(landed, blocks)}
    for name in CODECS:
        work = make_work(name, layout, blocks)
        acts |= {f"{name}_encode": work.encode, f"{name}_decode": work.decode}
        if f"{name}_encode_gbps" in TARGETS and load_library():
            acts |= ceilings_of(name, blocks, work.encoded.nbytes)
    return acts


def ceilings_of(name: str, blocks: Bytes2D, encoded_bytes: int) -> dict[str, Callable[[], object]]:
    """Return loops that read and store as many bytes as a codec; what is decoded is stored around
    the cache where the codec does so.
    """
    stream = CDLL(str(build(Recipe("bench", "the benchmarks' loops", NATIVE)))).stream
    stream.argtypes = (c_void_p, c_int64, c_void_p, c_int64, c_int64)
    raw, encoded = pages(blocks.shape), pages((1, encoded_bytes))
    is_around = raw.nbytes >= STREAM_FROM

    def walk(source: Bytes2D, to: Bytes2D, is_around: bool) -> None:
        stream(source.ctypes.data, source.nbytes, to.ctypes.data, to.nbytes, is_around)

    return {
        f"{name}_encode_ceiling": lambda: walk(raw, encoded, False),
        f"{name}_decode_ceiling": lambda: walk(encoded, raw, is_around),
    }


def measure_sizes(report: Report, dtype: str, kv: Bytes2D, layout: KVLayout) -> None:
    """Say how small real KV gets and how far it is off."""
    wanted = numbers(kv, dtype)
    for name in CODECS:
        codec = make_codec(name, layout)
        encoded = np.zeros((len(kv), codec.encoded_bytes), np.uint8)
        lengths = codec.encode(kv, range(len(kv)), encoded)
        landed = np.zeros_like(kv)
        codec.decode(encoded, landed, range(len(kv)))
        assert not codec.is_lossless or landed.tobytes() == kv.tobytes()
        error = np.sqrt(
            np.square(numbers(landed, dtype) - wanted).mean() / np.square(wanted).mean()
        )
        report.add(f"{name}_{dtype}_ratio", (lengths / codec.block_bytes).tolist(), "of raw")
        report.add(f"{name}_{dtype}_error", [float(error)], "relative")


def numbers(blocks: Bytes2D, dtype: str) -> np.ndarray:
    """Return what blocks hold as float64."""
    stored = np.uint16 if dtype == "bfloat16" else np.float32
    return convert(blocks.reshape(-1).view(stored), dtype, "float32").astype(np.float64)


def measure_zstd(report: Report, kv: Bytes2D, dtype: str, runs: int) -> None:
    """Give zstd what lossless entropy-codes: the exponents of a block, the rest kept."""
    if zstandard is None:
        print("  zstandard is not installed: lossless stands alone")
        return
    bits = kv.view(np.uint16 if dtype == "bfloat16" else np.uint32)
    width = 8 * bits.itemsize
    exponents = ((bits << 1 | bits >> (width - 1)) >> (width - 8)).astype(np.uint8)
    for level in (1, 3):
        packer, unpacker = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
        packed = [packer.compress(row.tobytes()) for row in exponents]
        kept = kv.shape[1] - exponents.shape[1]
        key = f"zstd{level}_{dtype}"
        report.add(f"{key}_ratio", [(len(one) + kept) / kv.shape[1] for one in packed], "of raw")
        rows = [row.tobytes() for row in exponents]
        for direction, act, items in (
            ("encode", packer.compress, rows),
            ("decode", unpacker.decompress, packed),
        ):
            each = partial(apply, act, items)
            rates = [rate(kv.nbytes, each) for _ in range(runs)]
            report.add(f"{key}_{direction}_gbps", rates, "GB/s", note="split and join not counted")


def apply(act: Callable[[bytes], bytes], items: list[bytes]) -> None:
    """Call a function for each."""
    for item in items:
        act(item)


def measure_quality(report: Report, dtype: str, model: LoadedModel, texts: list[list[int]]) -> None:
    """Let the model read with KV through each codec."""
    exact = read_texts(model, texts, block_size=BLOCK_SIZE)
    report.add(f"{dtype}_loss", [exact.loss], "nats a token", note=f"{len(exact.nats)} tokens")
    for name in CODECS:
        round_trip = round_trip_of(name, model.layout(BLOCK_SIZE))
        found = compare(exact, read_texts(model, texts, round_trip, block_size=BLOCK_SIZE))
        report.add(f"{name}_{dtype}_loss_increase_percent", [100 * found.loss_increase], "%")
        report.add(f"{name}_{dtype}_greedy_agreement", [found.greedy_agreement], "of positions")
    if dtype != "bfloat16":
        return
    for window in WINDOWS:
        part = Part(window=window)
        found = compare(exact, read_texts(model, texts, block_size=BLOCK_SIZE, part=part))
        report.add(f"window{window}_loss_increase_percent", [100 * found.loss_increase], "%")
        report.add(f"window{window}_greedy_agreement", [found.greedy_agreement], "of positions")
    measure_parts(report, model, [text for text in texts if len(text) > PROMPT_TOKENS + 256])


def measure_parts(report: Report, model: LoadedModel, texts: list[list[int]]) -> None:
    """Let the model go on after a prompt of which a part is kept."""
    exact = read_texts(model, texts, block_size=BLOCK_SIZE, part=Part(prompt_tokens=PROMPT_TOKENS))
    note = f"{len(exact.nats)} tokens of {len(texts)} files behind {PROMPT_TOKENS} tokens"
    report.add("after_prompt_loss", [exact.loss], "nats a token", note=note)
    for size in PARTS:
        for kind in ("window", "select"):
            part = Part(prompt_tokens=PROMPT_TOKENS, **{kind: size})
            found = compare(exact, read_texts(model, texts, block_size=BLOCK_SIZE, part=part))
            key = f"after_prompt_{kind}{size}"
            report.add(f"{key}_loss_increase_percent", [100 * found.loss_increase], "%")
            report.add(f"{key}_greedy_agreement", [found.greedy_agreement], "of positions")


def report_targets(report: Report) -> None:
    """Say which targets were met."""
    for key, target in TARGETS.items():
        if key in report.figures:
            verdict = "met" if report.figures[key] >= target else "missed"
            cached = report.figures[key.replace("_gbps", "_cached_gbps")]
            print(f"  {key} at least {target}: {verdict}, {report.figures[key]:.2f}", end="")
            print(f" (from the cache {cached:.2f}", end="")
            ceiling = report.figures.get(key.replace("_gbps", "_ceiling_gbps"), float("nan"))
            print(f"; its bytes alone {ceiling:.2f})")
    for name, target in LOSS_TARGETS.items():
        for dtype in ("bfloat16", "float32"):
            if (found := report.figures.get(f"{name}_{dtype}_loss_increase_percent")) is not None:
                verdict = "met" if found <= target else "missed"
                print(f"  {name}, {dtype}: loss at most +{target} %: {verdict}, {found:+.3f} %")


def main() -> None:
    """Run what the flags ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="less text and fewer runs")
    parser.add_argument(
        "--only", choices=("speed", "quality"), help="one half; the other is kept as it was"
    )
    parser.add_argument("--output", help="results file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    texts = held_out(2, 768) if args.quick else held_out(20, 2048)
    settings = {
        "kernels": "native" if load_library() else "numpy",
        "held-out text": f"{len(texts)} files, {sum(map(len, texts))} tokens",
        "pool": f"{LARGE_BLOCKS} blocks of {LARGE.block_bytes[0]} bytes, bf16",
        "clock": "processor time of one thread",
    }
    report = Report("codec", settings=settings)
    if args.only:
        report.resume(args.output)
    for dtype in ("bfloat16", "float32"):
        model = load(dtype)
        kv = real_kv(model, texts[:2])
        if args.only != "quality":
            if dtype == "bfloat16":
                measure_speed(report, kv, model.layout(BLOCK_SIZE), 5 if args.quick else 21)
            measure_sizes(report, dtype, kv, model.layout(BLOCK_SIZE))
            measure_zstd(report, kv, dtype, 5)
        if args.only != "speed":
            measure_quality(report, dtype, model, texts)
    report_targets(report)
    report.finish(args.output)


if __name__ == "__main__":
    main()
