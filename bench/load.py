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
    """What one streamed request got: when it was sent and when its tokens came, in seconds."""

    sent_s: float
    token_s: list[float] = field(default_factory=list)
    status: int = 0
    body: bytes = b""

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.token_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first."""
        return (self.token_s[-1] - self.token_s[0]) / max(1, len(self.token_s) - 1)

    @property
    def itl_s(self) -> list[float]:
        """Times between tokens."""
        return [b - a for a, b in zip(self.token_s, self.token_s[1:], strict=False)]


class Client:
    """Keep-alive connections to one server."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def complete(self, body: dict[str, object], path: str = "/v1/completions") -> Answer:
        """Send one request and read its answer to the end. Streamed events that carry text are
        stamped.
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
            answer.token_s.append(time.perf_counter())
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
            now_s = time.perf_counter()
            # One HTTP chunk may carry several events; only those with a choice carry a token.
            answer.token_s += [now_s] * data.count(b'"text":"')

    def close(self) -> None:
        """Close all connections."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()


def percentile(values: list[float], share: float) -> float:
    """Return the value below which `share` of `values` lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
