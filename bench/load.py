"""An HTTP load generator that costs little: raw asyncio connections, parsed only as far as the
clock needs.

A benchmark that shares two cores with the server must not spend them itself. One `Client` keeps
connections open; each request is a prebuilt byte string, each streamed event is stamped when it is
read.
"""

import asyncio
import json
import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class Answer:
    """What one streamed request got: when it was sent, when its text came, a stamp for each event,
    and when its end was said, in seconds.

    A token that ends within a character has no event: its text comes with the next. So
    `num_tokens` is what was asked for once the end says that it was reached, 0 otherwise, and no
    count of events.
    """

    sent_s: float
    num_tokens: int = 0
    token_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0
    status: int = 0
    body: bytes = b""

    def take(self, data: bytes, now_s: float) -> None:
        """Note the events in some of the answer; the one that ends the choice has no text."""
        num_events, num_empty = data.count(b'"text":"'), data.count(b'"text":""')
        self.token_s += [now_s] * (num_events - num_empty)
        if b'"finish_reason":"length"' in data:
            self.ended_s = now_s

    @property
    def is_complete(self) -> bool:
        """True when all that was asked for has been generated."""
        return self.status == 200 and self.num_tokens > 0 and bool(self.token_s)

    @property
    def is_token_by_token(self) -> bool:
        """True when every token had an event of its own, the first one among them."""
        return len(self.token_s) == self.num_tokens

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.token_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first."""
        return (self.ended_s - self.token_s[0]) / max(1, self.num_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Times between events with text."""
        return [b - a for a, b in zip(self.token_s, self.token_s[1:], strict=False)]


class Client:
    """Keep-alive connections to one server."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def complete(self, body: dict[str, object], path: str = "/v1/completions") -> Answer:
        """Send one request, which has `max_tokens`, and read its answer to the end. Streamed events
        that carry text are stamped, and so is the one that ends the choice.
        """
        payload = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(payload)}\r\n\r\n"
        ).encode()
        reader, writer = self._idle.pop() if self._idle else await self._connect()
        answer = Answer(time.perf_counter())
        writer.write(head + payload)
        raw_head = await reader.readuntil(b"\r\n\r\n")
        answer.status = int(raw_head.split(b" ", 2)[1])
        headers = raw_head.lower()
        if b"chunked" in headers:
            await self._read_chunks(reader, answer)
        else:
            length = int(headers.split(b"content-length:")[1].split(b"\r\n")[0])
            answer.body = await reader.readexactly(length)
            answer.take(answer.body, time.perf_counter())
        if answer.ended_s:
            answer.num_tokens = int(str(body["max_tokens"]))
            answer.token_s = answer.token_s or [answer.ended_s]
        self._idle.append((reader, writer))
        return answer

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*self._address, limit=1 << 20)

    async def _read_chunks(self, reader: asyncio.StreamReader, answer: Answer) -> None:
        while True:
            size = int(await reader.readline(), 16)
            data = await reader.readexactly(size + 2)
            if not size:
                return
            answer.take(data, time.perf_counter())

    def close(self) -> None:
        """Close all connections."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()


def percentile(values: list[float], share: float) -> float:
    """Return the value below which `share` of `values` lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
