"""Responses in the forms of the OpenAI API: whole bodies, and the chunks of a stream.

Owns how a choice, its log probabilities, the usage and the ledger are written. Knows no HTTP and
takes no decision. `stream.py` and `app.py` call it. A chunk is put together from byte strings made
once a stream, as encoding a struct a token would cost more than the rest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from penstock.core.errors import PenstockError
from penstock.core.types import NS_PER_S
from penstock.server.choice import Choice, TokenReport
from penstock.server.errors import error_body
from penstock.server.intake import Query
from penstock.server.results import (
    Alternative,
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatTokenLogprob,
    Completion,
    Ledger,
    PromptTokensDetails,
    TextChoice,
    TextLogprobs,
    Usage,
)
from penstock.server.tokenizer import Tokenizer

_LOGPROB_MIN = -9999.0  # stands for minus infinity, which JSON does not have
_encode = msgspec.json.Encoder().encode


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Return one token as text; what is no whole character becomes a replacement character."""
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace")


def _token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """Return one token as text, or as `bytes:\\xf0` where it is no whole character: the form of
    completions has no other place for bytes.
    """
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(tokenizer: Tokenizer, reports: Sequence[TokenReport]) -> ChatLogprobs:
    """Return log probabilities in the form of chats."""

    def alternative(token_id: int, logprob: float) -> Alternative:
        text, values = token_text(tokenizer, token_id), list(tokenizer.token_bytes(token_id))
        return Alternative(text, max(logprob, _LOGPROB_MIN), values)

    content = []
    for report in reports:
        own = alternative(report.token_id, report.logprobs.logprob)
        top = [alternative(*entry) for entry in report.logprobs.top]
        content.append(ChatTokenLogprob(own.token, own.logprob, own.bytes, top))
    return ChatLogprobs(content)


def text_logprobs(tokenizer: Tokenizer, reports: Sequence[TokenReport]) -> TextLogprobs:
    """Return log probabilities in the form of completions; the token itself is among them."""
    tokens = [_token_name(tokenizer, report.token_id) for report in reports]
    own = [max(report.logprobs.logprob, _LOGPROB_MIN) for report in reports]
    top = []
    for report, token, logprob in zip(reports, tokens, own, strict=True):
        entries = {
            _token_name(tokenizer, token_id): max(value, _LOGPROB_MIN)
            for token_id, value in reversed(report.logprobs.top)
        }
        top.append(entries | {token: logprob})
    return TextLogprobs([report.offset for report in reports], own, tokens, top)


def usage(query: Query, choices: Sequence[Choice]) -> Usage:
    """Count the tokens of these choices, which are all of the query's or one of them."""
    if len(choices) == len(query.requests):
        prompt_tokens = query.prompt_tokens
        cached = sum(c.cached_tokens for c in choices[:: len(choices) // query.prompts])
    else:
        prompt_tokens = sum(len(c.request.prompt_token_ids) for c in choices)
        cached = sum(c.cached_tokens for c in choices)
    generated = sum(choice.num_tokens for choice in choices)
    details = PromptTokensDetails(cached)
    return Usage(prompt_tokens, generated, prompt_tokens + generated, details)


def ledger(choices: Sequence[Choice]) -> Ledger | list[Ledger]:
    """Return what the time to first token went into, one object for each choice; seconds."""
    entries = [_ledger_of(choice) for choice in choices]
    return entries[0] if len(entries) == 1 else entries


def _ledger_of(choice: Choice) -> Ledger:
    timeline = choice.timeline
    if timeline is None:
        return {}
    entry: Ledger = dict(timeline.ledger(choice.delivered_ns or choice.first_ns))
    for name in _PROVEN:
        entry[name] = getattr(timeline, name)
    entry["exposed"] = timeline.exposed_ns / NS_PER_S
    entry["exposed_decode"] = timeline.exposed_decode_ns / NS_PER_S
    entry["held"] = max(0, timeline.pulled_ns - timeline.held_ns) / NS_PER_S
    return entry


_PROVEN = (
    "prefill_worker", "decode_worker", "transport", "pull_bytes", "pull_bytes_per_s", "pull_spans",
    "pull_moves", "pull_verified", "cached_tokens", "selected_tokens",
)  # fmt: skip
"""Fields of a timeline that prove what was done, beside those that say how long it took."""


def whole_chat(
    query: Query, created: int, choices: Sequence[Choice], texts: Sequence[str], tok: Tokenizer
) -> bytes:
    """Return the body of a finished chat."""
    answers = [
        ChatChoice(
            index=choice.index,
            message=AssistantMessage(text),
            logprobs=(
                chat_logprobs(tok, choice.release_reports()) if _has_logprobs(choice) else None
            ),
            finish_reason=choice.finish_reason,
        )
        for choice, text in zip(choices, texts, strict=True)
    ]
    return _encode(
        ChatCompletion(
            id=query.query_id,
            created=created,
            model=query.model,
            choices=answers,
            usage=usage(query, choices),
            penstock_ledger=ledger(choices) if query.wants_ledger else msgspec.UNSET,
        )
    )


def whole_text(
    query: Query, created: int, choices: Sequence[Choice], texts: Sequence[str], tok: Tokenizer
) -> bytes:
    """Return the body of a finished completion."""
    answers = [
        TextChoice(
            index=choice.index,
            text=query.echoes[choice.index] + text,
            logprobs=(
                text_logprobs(tok, choice.release_reports()) if _has_logprobs(choice) else None
            ),
            finish_reason=choice.finish_reason,
        )
        for choice, text in zip(choices, texts, strict=True)
    ]
    return _encode(
        Completion(
            id=query.query_id,
            created=created,
            model=query.model,
            choices=answers,
            usage=usage(query, choices),
            penstock_ledger=ledger(choices) if query.wants_ledger else msgspec.UNSET,
        )
    )


def _has_logprobs(choice: Choice) -> bool:
    return choice.request.params.logprobs is not None


@dataclass(frozen=True, slots=True)
class ChunkStyle:
    """The JSON around a chunk's text; `opening` is what a choice begins with, if with anything."""

    object: bytes
    opening: bytes
    before_text: bytes
    after_text: bytes
    ending: bytes


_CHAT_CHUNKS = ChunkStyle(
    object=b"chat.completion.chunk",
    opening=b'"delta":{"role":"assistant","content":""}',
    before_text=b'"delta":{"content":',
    after_text=b"}",
    ending=b'"delta":{}',
)
_TEXT_CHUNKS = ChunkStyle(
    object=b"text_completion",
    opening=b"",
    before_text=b'"text":',
    after_text=b"",
    ending=b'"text":""',
)
DONE = b"data: [DONE]\n\n"

WholeWriter = Callable[[Query, int, Sequence[Choice], Sequence[str], Tokenizer], bytes]


@dataclass(frozen=True, slots=True)
class Form:
    """One of the two ways in which the API writes a generation."""

    whole: WholeWriter
    chunks: ChunkStyle


CHAT = Form(whole_chat, _CHAT_CHUNKS)
TEXT = Form(whole_text, _TEXT_CHUNKS)


class ChunkWriter:
    """Writes the events of one stream."""

    def __init__(self, style: ChunkStyle, query: Query, created: int, tok: Tokenizer) -> None:
        self._style, self._query, self._tokenizer = style, query, tok
        self._head = b'data: {"id":%s,"object":"%s","created":%d,"model":%s,"choices":[' % (
            _encode(query.query_id), style.object, created, _encode(query.model),
        )  # fmt: skip
        self._starts = [
            b'%s{"index":%d,' % (self._head, index) for index in range(len(query.requests))
        ]
        self._text_starts = [start + style.before_text for start in self._starts]
        self._no_usage = b',"usage":null' if query.has_usage else b""
        self._text_end = (
            style.after_text
            + b',"logprobs":null,"finish_reason":null}]'
            + self._no_usage
            + b"}\n\n"
        )

    def opening(self, choice: Choice) -> bytes:
        """Return the event a choice begins with, which may be none."""
        echo = self._query.echoes[choice.index]
        first = b""
        if self._style.opening:
            tail = b',"logprobs":null,"finish_reason":null}]' + self._no_usage + b"}\n\n"
            first = self._starts[choice.index] + self._style.opening + tail
        return first + self.text(choice, echo, ()) if echo else first

    def text(self, choice: Choice, text: str, reports: Sequence[TokenReport]) -> bytes:
        """Return the event for new text."""
        if not reports and not self._query.has_running_usage:
            return self._text_starts[choice.index] + _encode(text) + self._text_end
        return b'%s%s%s,"logprobs":%s,"finish_reason":null}]%s}\n\n' % (
            self._text_starts[choice.index],
            _encode(text),
            self._style.after_text,
            self._logprobs(reports),
            self._running_usage(choice),
        )

    def ending(self, choice: Choice, tail: bytes = b"") -> bytes:
        """Return the event with the finish reason; `tail` is JSON to put behind its fields."""
        return b'%s%s,"logprobs":null,"finish_reason":%s}]%s%s}\n\n' % (
            self._starts[choice.index],
            self._style.ending,
            _encode(choice.finish_reason),
            self._running_usage(choice),
            tail,
        )

    def closing(self, choices: Sequence[Choice], last: Choice) -> bytes:
        """Return the events that end the stream, `last` being the choice that ended it."""
        query, final = self._query, self._ledger(choices)
        if not query.has_usage:
            return self.ending(last, final) + DONE
        figures = _encode(usage(query, choices))
        total = b'%s],"usage":%s%s}\n\n' % (self._head, figures, final)
        return self.ending(last) + total + DONE

    def failure(self, error: PenstockError) -> bytes:
        """Return the events that end a stream which cannot go on."""
        return b"data: %s\n\n%s" % (error_body(error), DONE)

    def _logprobs(self, reports: Sequence[TokenReport]) -> bytes:
        if not reports:
            return b"null"
        if self._style is _CHAT_CHUNKS:
            return _encode(chat_logprobs(self._tokenizer, reports))
        return _encode(text_logprobs(self._tokenizer, reports))

    def _running_usage(self, choice: Choice) -> bytes:
        if not self._query.has_running_usage:
            return self._no_usage
        return b',"usage":' + _encode(usage(self._query, [choice]))

    def _ledger(self, choices: Sequence[Choice]) -> bytes:
        if not self._query.wants_ledger:
            return b""
        return b',"penstock_ledger":' + _encode(ledger(choices))
