"""Sends a generation as server-sent events, each at once, and no faster than the client reads.

Owns the events that wait for the client and decides when a client is given up. The sinks put events
together within the service's own call; one task sends all that have gathered since it last ran.
`app.py` calls it.
"""

import asyncio
import logging
from time import monotonic, monotonic_ns

from starlette.types import Receive, Send

from penstock.server.asgi import Doorbell, watch
from penstock.server.choice import Choice
from penstock.server.errors import Headers
from penstock.server.generation import Generation
from penstock.server.openai import ChunkWriter
from penstock.server.settings import ServerSettings

logger = logging.getLogger(__name__)

_HEADERS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class EventStream:
    """The response of one streaming request."""

    def __init__(
        self, generation: Generation, writer: ChunkWriter, settings: ServerSettings
    ) -> None:
        self._generation, self._writer, self._settings = generation, writer, settings
        self._events: list[bytes] = []
        self._num_bytes = 0
        self._bell = Doorbell()
        self._opened: set[int] = set()
        self._undelivered: list[Choice] = []
        self._last: Choice | None = None
        self._is_gone = False
        self._blocked_since: float | None = None
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._reason_given_up = ""

    async def run(self, receive: Receive, send: Send, headers: Headers) -> None:
        """Serve until the last event, the end of the client or of the generation.

        Raises: what ends the generation before its first token; nothing has been sent then.
        """
        self._task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        self._generation.start(self._take, self._bell.ring)
        watcher = loop.create_task(watch(receive, self._leave))
        self._timer = loop.call_later(self._settings.stall_timeout_s, self._check_stall)
        try:
            await self._send_all(send, headers)
        except asyncio.CancelledError:
            if not self._reason_given_up:
                raise
            assert self._task is not None, "set above"
            self._task.uncancel()
            logger.warning("%s: %s", self._generation.query.query_id, self._reason_given_up)
        finally:
            if self._timer is not None:
                self._timer.cancel()
            watcher.cancel()
            self._generation.cancel()

    async def _send_all(self, send: Send, headers: Headers) -> None:
        generation = self._generation
        await self._bell.wait()
        if self._is_gone:
            return
        if generation.failure is not None and not self._events:
            raise generation.failure
        start = {"type": "http.response.start", "status": 200, "headers": _HEADERS + headers}
        self._blocked_since = monotonic()
        await send(start)
        self._blocked_since = None
        has_more = True
        while has_more and not self._is_gone:
            if not self._events and not generation.has_ended:
                await self._bell.wait()
                continue
            has_more = not generation.has_ended
            body = self._gather(has_more)
            self._blocked_since = monotonic()
            await send({"type": "http.response.body", "body": body, "more_body": has_more})
            self._blocked_since = None

    def _gather(self, has_more: bool) -> bytes:
        """Take the events that wait, and the closing ones if these are the last."""
        if self._undelivered:
            now_ns = monotonic_ns()
            for choice in self._undelivered:
                choice.delivered_ns = now_ns
            self._undelivered.clear()
        events = self._events
        self._events, self._num_bytes = [], 0
        if not has_more:
            events.append(self._closing())
        return events[0] if len(events) == 1 else b"".join(events)

    def _closing(self) -> bytes:
        failure = self._generation.failure
        if failure is not None:
            return self._writer.failure(failure)
        assert self._last is not None, "a generation without a failure ends with a choice"
        return self._writer.closing(self._generation.choices, self._last)

    def _take(self, choice: Choice, text: str) -> None:
        """Listen to the generation: put the events of this output in the queue."""
        if choice.index not in self._opened:
            self._opened.add(choice.index)
            self._undelivered.append(choice)
            self._put(self._writer.opening(choice))
        reports = choice.release_reports()
        if text or reports:
            self._put(self._writer.text(choice, text, reports))
        if choice.finish_reason is not None:
            if not self._generation.has_ended:
                self._put(self._writer.ending(choice))
            else:
                self._last = choice
        self._bell.ring()

    def _put(self, event: bytes) -> None:
        if not event:
            return
        self._events.append(event)
        self._num_bytes += len(event)
        if self._num_bytes > self._settings.stream_buffer_bytes and self._blocked_since is not None:
            self._give_up(f"the client is {self._num_bytes} bytes behind: gave it up")

    def _leave(self) -> None:
        self._is_gone = True
        self._bell.ring()

    def _check_stall(self) -> None:
        """Give up a client that has taken nothing for too long, or look again later."""
        timeout_s, since = self._settings.stall_timeout_s, self._blocked_since
        waited_s = 0.0 if since is None else monotonic() - since
        if waited_s >= timeout_s:
            self._give_up(f"the client has read nothing for {waited_s:.0f} s: gave it up")
        else:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(timeout_s - waited_s, self._check_stall)

    def _give_up(self, reason: str) -> None:
        if self._reason_given_up or self._task is None:
            return
        self._reason_given_up = reason
        asyncio.get_running_loop().call_soon(self._generation.cancel)
        self._task.cancel()
