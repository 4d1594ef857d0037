"""The requests behind one HTTP response, from submission to the last token or the cancellation.

Owns the state that the service's sinks feed. Knows no format. `app.py` makes it; `stream.py` or the
whole response listens to it.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from time import monotonic_ns

from penstock.core.errors import (
    CapacityExceeded,
    PeerLost,
    PenstockError,
    PromptTooLong,
    WorkersUnavailable,
)
from penstock.core.messages import RequestFailed, TokenOutput
from penstock.core.service import Service
from penstock.core.types import NS_PER_S, FinishReason
from penstock.server.choice import Choice
from penstock.server.intake import Query
from penstock.server.metrics import Metrics
from penstock.server.request_log import log_choice
from penstock.server.settings import ServedModel

Listener = Callable[[Choice, str], None]
"""Called with the text that may leave, maybe none, after each output of a choice."""


class Generation:
    """All choices of one response. `failure` is what ended them before their time."""

    _listener: Listener
    _on_end: Callable[[], None]

    def __init__(
        self, service: Service, query: Query, model: ServedModel, metrics: Metrics
    ) -> None:
        self.query = query
        self.choices = [Choice(index, query, model) for index in range(len(query.requests))]
        self.failure: PenstockError | None = None
        self._open = set(range(len(self.choices)))
        self._service = service
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()

    @property
    def has_ended(self) -> bool:
        """True when nothing more will come."""
        return not self._open or self.failure is not None

    def start(self, listener: Listener, on_end: Callable[[], None]) -> None:
        """Submit every request; `on_end` is called once, when nothing more will come.

        Raises: what `Service.submit` raises; then none is under way.
        """
        self._listener, self._on_end = listener, on_end
        try:
            for choice in self.choices:
                self._service.submit(choice.request, partial(self._take, choice))
        except PenstockError as error:
            self.cancel()
            self.failure = error
            if isinstance(error, PromptTooLong):
                error.field = "messages" if self.query.query_id.startswith("chat") else "prompt"
            raise

    def cancel(self) -> None:
        """Stop what is still under way; nothing more will come."""
        for index in sorted(self._open):
            choice = self.choices[index]
            choice.finish_reason = FinishReason.ABORT.value
            self._service.cancel(choice.request.request_id)
        self._open.clear()

    def close(self, log: bool) -> None:
        """Write the books: metrics, and one log line per choice if asked for."""
        for choice in self.choices:
            self._metrics.observe(choice, self.failure is not None)
            if log:
                log_choice(choice, self.failure)

    def _take(self, choice: Choice, event: TokenOutput | RequestFailed) -> None:
        """Sink of one request. Runs within the service's call, so it calls nothing back."""
        if choice.index not in self._open or self.failure is not None:
            return
        if isinstance(event, RequestFailed):
            self._fail(_failure(event))
            return
        if event.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
            self._fail(WorkersUnavailable("the server gave the request up"))
            return
        text = choice.take(event)
        self._stamp(choice, len(event.token_ids))
        if choice.has_ended:
            self._open.remove(choice.index)
            if event.finish_reason is None:
                self._loop.call_soon(self._service.cancel, choice.request.request_id)
        self._listener(choice, text)
        if not self._open:
            self._on_end()

    def _stamp(self, choice: Choice, num_tokens: int) -> None:
        if not num_tokens:
            return
        now_ns = monotonic_ns()
        if choice.first_ns:
            self._metrics.count_tokens(num_tokens, (now_ns - choice.last_ns) / NS_PER_S)
        else:
            choice.first_ns = now_ns
            self._metrics.count_first(choice, num_tokens)
        choice.last_ns = now_ns

    def _fail(self, failure: PenstockError) -> None:
        self.failure = failure
        self._loop.call_soon(self.cancel)
        self._on_end()


def _failure(event: RequestFailed) -> PenstockError:
    if event.retry_after_s is not None:
        return CapacityExceeded(event.reason, event.retry_after_s)
    return WorkersUnavailable(event.reason) if event.is_retryable else PeerLost(event.reason)
