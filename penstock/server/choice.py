"""One sequence on its way to the client: tokens in, text out.

Owns the text that is held back (half characters, what may become a stop string), the log
probabilities that belong to it, and why the sequence ended. Knows no HTTP and no format.
`generation.py` feeds it, `stream.py` and `openai.py` read it.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.core.messages import TokenOutput
from penstock.core.request import Request, Timeline
from penstock.core.step import TokenLogprobs
from penstock.core.types import FinishReason
from penstock.server.detokenize import TextStream
from penstock.server.intake import Query
from penstock.server.settings import ServedModel
from penstock.server.stop import StopStrings


@dataclass(frozen=True, slots=True)
class TokenReport:
    """A token with its log probabilities. `offset` is where its text begins in the output."""

    offset: int
    token_id: int
    logprobs: TokenLogprobs


class Choice:
    """The output of one request.

    `num_tokens` counts what was generated, `first_ns` and `last_ns` are when tokens came,
    `delivered_ns` when the first left for the client. `finish_reason` is None until the end.
    """

    __slots__ = (
        "_decoded",
        "_is_plain",
        "_released",
        "_reports",
        "_stop_ids",
        "_stops",
        "_stream",
        "delivered_ns",
        "finish_reason",
        "first_ns",
        "includes_stop",
        "index",
        "last_ns",
        "num_tokens",
        "request",
        "timeline",
    )

    def __init__(self, index: int, query: Query, model: ServedModel) -> None:
        self.index = index
        self.request: Request = query.requests[index]
        self.includes_stop = query.includes_stop
        self.num_tokens = 0
        self.first_ns = self.last_ns = self.delivered_ns = 0
        self.timeline: Timeline | None = None
        self.finish_reason: str | None = None
        params = self.request.params
        self._stream: TextStream = model.tokenizer.stream(
            self.request.prompt_token_ids, skip_special_tokens=query.skip_special_tokens
        )
        self._stops = StopStrings(params.stop) if params.stop else None
        self._stop_ids = {*model.eos_token_ids, *params.stop_token_ids}
        self._is_plain = self._stops is None and params.logprobs is None
        self._reports: deque[TokenReport] = deque()
        self._decoded = self._released = 0

    @property
    def has_ended(self) -> bool:
        """True when no more text will come."""
        return self.finish_reason is not None

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose KV was found in a prefix cache."""
        return self.timeline.cached_tokens if self.timeline is not None else 0

    def take(self, output: TokenOutput) -> str:
        """Take new tokens; return the text that may leave now.

        Sets `finish_reason` at the service's last output, or earlier at a stop string: then the
        caller is to cancel the request.
        """
        if self.timeline is None:
            self.timeline = output.timeline
        token_ids = output.token_ids
        if output.finish_reason is not None:
            return self._take_last(output, output.finish_reason)
        if not self._is_plain:
            return self._take_each(token_ids, output.logprobs)
        self.num_tokens += len(token_ids)
        push = self._stream.push
        return push(token_ids[0]) if len(token_ids) == 1 else "".join(map(push, token_ids))

    def release_reports(self) -> list[TokenReport]:
        """Return the reports of tokens whose text has left, each once."""
        released = []
        while self._reports and self._reports[0].offset < self._released:
            released.append(self._reports.popleft())
        return released

    def _take_each(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> str:
        pieces = []
        for at, token_id in enumerate(token_ids):
            self.num_tokens += 1
            piece = self._stream.push(token_id)
            if logprobs:
                self._reports.append(TokenReport(self._decoded, token_id, logprobs[at]))
                self._decoded += len(piece)
            pieces.append(self._let_through(piece))
            if self.finish_reason is not None:
                break
        return "".join(pieces)

    def _take_last(self, output: TokenOutput, reason: FinishReason) -> str:
        token_ids = output.token_ids
        is_stop_token = (
            reason is FinishReason.STOP and token_ids[-1:] and self._is_stop_token(token_ids[-1])
        )
        shown = token_ids[:-1] if is_stop_token else token_ids
        text = self._take_each(shown, output.logprobs)
        if self.finish_reason is not None:
            return text
        self.num_tokens += len(token_ids) - len(shown)
        text += self._let_through(self._stream.flush())
        if self.finish_reason is None:
            self.finish_reason = reason.value
            text += self._stops.flush() if self._stops is not None else ""
            self._released = self._decoded + 1  # whatever has no text of its own leaves as well
        return text

    def _is_stop_token(self, token_id: int) -> bool:
        """Tell whether the client does not want to see this last token."""
        return token_id in self._stop_ids and not self.includes_stop

    def _let_through(self, piece: str) -> str:
        """Look for stop strings, from the first token on that may end the sequence."""
        if self._stops is None or self.num_tokens <= self.request.params.min_tokens:
            self._released += len(piece)
            return piece
        text, found = self._stops.push(piece)
        if found is not None:
            self.finish_reason = FinishReason.STOP.value
            text += found if self.includes_stop else ""
        self._released += len(text)
        return text
