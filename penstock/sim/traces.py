"""Workloads from files: what a recorded trace or a table of lengths holds, as `Arrival`s.

What a file is, its columns say (`read_workload`):

timestamp, input_length, output_length, hash_ids    Mooncake's JSON lines, stamps in milliseconds
arrival_time_ns, input_length, ..., hash_ids        the same with exact times
session_id, call, input_length, ..., hash_ids       sessions of agents, without times
TIMESTAMP, ContextTokens, GeneratedTokens           Azure's CSV
arrival_s, client_id, input_tokens, output_tokens   samples in the manner of ServeGen
num_prefill_tokens, num_decode_tokens               lengths alone: ShareGPT, arXiv summaries
dataset, avg_length, unit, max_new_tokens           LongBench's table

Files may be gzipped. Arrivals of files without times are drawn.
"""

import csv
import gzip
import io
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from penstock.core.errors import BadRequest
from penstock.core.types import NS_PER_MS, NS_PER_S
from penstock.sim.workload import FIRST_NAME, Arrival, Piece, Turn, lognormal

Row = dict[str, Any]
NAMES_PER_KIND: Final = 1 << 31
"""Names from here on are the tails of prompts that no hash id of the trace covers."""
TOKENS_PER_UNIT: Final = {"words": 1.35, "characters": 1.0}
"""LongBench counts words (English, code) or characters (Chinese); tokens of either, roughly."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A file's requests: with times (in order, from 0 on), or without any."""

    path: str
    arrivals: list[Arrival]
    is_timed: bool
    kind: str = ""
    duration_s: float = field(default=0.0)


def read_workload(path: str, seed: int = 0) -> Recording:
    """Read a file; `seed` is for what the file leaves open.

    Raises: `BadRequest` when it cannot be read or has none of the known columns.
    """
    try:
        text = _read(Path(path))
        rows: Iterable[Row]
        if text[:1] == "{":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = list(csv.DictReader(io.StringIO(text)))
        first = next(iter(rows))
        for columns, kind, is_timed, read in _KINDS:
            if columns <= first.keys():
                arrivals = read(rows, random.Random(seed))
                duration_s = arrivals[-1].at_ns / NS_PER_S
                return Recording(path, arrivals, is_timed, kind, duration_s)
    except (OSError, ValueError, KeyError, StopIteration, UnicodeDecodeError) as error:
        raise BadRequest(f"{path} is not a workload that can be read: {error!r}") from error
    known = "; ".join(", ".join(sorted(columns)) for columns, *_ in _KINDS)
    raise BadRequest(f"{path} has columns {', '.join(first)}; known are: {known}")


def _read(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()


def _mooncake(rows: Iterable[Row], rng: random.Random) -> list[Arrival]:
    """Spread requests that share a stamp evenly at random up to the next one."""
    listed = list(rows)
    stamps = sorted({int(row["timestamp"]) for row in listed})
    gap_ms = min((b - a for a, b in pairwise(stamps)), default=0)
    size = _hash_block(listed)

    def at_ns(row: Row) -> int:
        return int((int(row["timestamp"]) + rng.random() * gap_ms) * NS_PER_MS)

    return _ordered(
        Arrival(at_ns(row), _hashed(row, size, i), int(row["output_length"]))
        for i, row in enumerate(listed)
    )


def _stamped(rows: Iterable[Row], rng: random.Random) -> list[Arrival]:
    listed = list(rows)
    size = _hash_block(listed)
    return _ordered(
        Arrival(int(row["arrival_time_ns"]), _hashed(row, size, i), int(row["output_length"]))
        for i, row in enumerate(listed)
    )


def _agents(rows: Iterable[Row], rng: random.Random) -> list[Arrival]:
    """Make one arrival of each session; a call follows the answer before it after a tool's time.

    What a call adds to the prompt is new; when its prompt is shorter than conversation and answer
    (the source has dropped some), one token is new.
    """
    listed = list(rows)
    size = _hash_block(listed)
    calls: dict[str, list[Row]] = {}
    for row in listed:
        calls.setdefault(row["session_id"], []).append(row)
    arrivals = []
    for i, session in enumerate(calls.values()):
        session.sort(key=lambda row: int(row["call"]))
        turns = []
        for before, row in pairwise(session):
            known = int(before["input_length"]) + int(before["output_length"])
            gap_ns = int(rng.expovariate(1.0) * NS_PER_S)
            new = max(1, int(row["input_length"]) - known)
            turns.append(Turn(gap_ns, new, max(1, int(row["output_length"]))))
        first = session[0]
        pieces = _hashed(first, size, i)
        arrivals.append(Arrival(0, pieces, max(1, int(first["output_length"])), tuple(turns)))
    return arrivals


def _azure(rows: Iterable[Row], rng: random.Random) -> list[Arrival]:
    def seconds(row: Row) -> float:
        stamp = row["TIMESTAMP"]  # seven digits of a second, of which Python takes six
        return datetime.fromisoformat(stamp[:26]).timestamp()

    return _single(rows, seconds, "ContextTokens", "GeneratedTokens")


def _servegen(rows: Iterable[Row], rng: random.Random) -> list[Arrival]:
    return _single(rows, lambda row: float(row["arrival_s"]), "input_tokens", "output_tokens")


def _lengths(rows: Iterable[Row], rng: random.Random) -> list[Arrival]:
    arrivals = _single(rows, lambda _: 0.0, "num_prefill_tokens", "num_decode_tokens")
    rng.shuffle(arrivals)
    return arrivals


def _longbench(rows: Iterable[Row], rng: random.Random) -> list[Arrival]:
    """Draw as many prompts of each dataset as it has samples.

    The table has means alone; lengths are taken as lognormal with a standard deviation of half the
    mean, which is an assumption.
    """
    arrivals: list[Arrival] = []
    for row in rows:
        mean = float(row["avg_length"]) * TOKENS_PER_UNIT.get(row["unit"], 1.35)
        for _ in range(int(row["samples"])):
            pieces = ((FIRST_NAME + len(arrivals), lognormal(rng, mean, 0.47)),)
            arrivals.append(Arrival(0, pieces, int(row["max_new_tokens"])))
    rng.shuffle(arrivals)
    return arrivals


def _single(
    rows: Iterable[Row], seconds: Callable[[Row], float], prompt: str, output: str
) -> list[Arrival]:
    """Make requests that share nothing."""
    return _ordered(
        Arrival(
            int(seconds(row) * NS_PER_S),
            ((FIRST_NAME + i, max(1, int(row[prompt]))),),
            max(1, int(row[output])),
        )
        for i, row in enumerate(rows)
    )


def _ordered(arrivals: Iterator[Arrival]) -> list[Arrival]:
    """Sort by time and let the first come at 0."""
    listed = sorted(arrivals, key=lambda arrival: arrival.at_ns)
    start_ns = listed[0].at_ns
    return [Arrival(a.at_ns - start_ns, a.pieces, a.output_tokens, a.turns) for a in listed]


def _hash_block(rows: list[Row]) -> int:
    """Return the tokens that one hash id stands for: a power of two that covers every prompt."""
    widest = max(int(row["input_length"]) / max(1, len(row["hash_ids"])) for row in rows)
    size = 1
    while size < widest:
        size *= 2
    return size


def _hashed(row: Row, size: int, index: int) -> tuple[Piece, ...]:
    """Turn hash ids into pieces; the last, partial one is the request's own."""
    length = int(row["input_length"])
    num_full = min(length // size, len(row["hash_ids"]))
    pieces = [(FIRST_NAME + int(name), size) for name in row["hash_ids"][:num_full]]
    if length > num_full * size:
        pieces.append((NAMES_PER_KIND + index, length - num_full * size))
    return tuple(pieces)


_Reader = Callable[[Iterable[Row], random.Random], list[Arrival]]
_KINDS: Final[tuple[tuple[frozenset[str], str, bool, _Reader], ...]] = (
    (frozenset({"arrival_time_ns", "input_length", "hash_ids"}), "hashed", True, _stamped),
    (frozenset({"session_id", "call", "hash_ids"}), "agents", False, _agents),
    (frozenset({"timestamp", "input_length", "hash_ids"}), "mooncake", True, _mooncake),
    (frozenset({"TIMESTAMP", "ContextTokens", "GeneratedTokens"}), "azure", True, _azure),
    (frozenset({"arrival_s", "input_tokens", "output_tokens"}), "servegen", True, _servegen),
    (frozenset({"num_prefill_tokens", "num_decode_tokens"}), "lengths", False, _lengths),
    (frozenset({"dataset", "avg_length", "max_new_tokens"}), "longbench", False, _longbench),
)
