"""Turns a body into requests that a cluster can serve, or into a `BadRequest` that says why not.

Owns everything about a body that needs the model to be judged: the name, the window, the
vocabulary, the tokens of the prompt. Also draws seeds, as cores draw nothing. Knows no HTTP.
`app.py` calls it.
"""

import asyncio
import secrets
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeGuard

import msgspec
from msgspec.structs import replace

from penstock.core.errors import BadRequest, PromptTooLong, UnknownModel
from penstock.core.request import Request, SamplingParams
from penstock.core.types import NS_PER_S, RequestId
from penstock.server.schema import (
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    GenerationBody,
    KVOptions,
    TokenizeRequest,
    refuse_unsupported,
)
from penstock.server.settings import ServedModel, ServerSettings

_ROLES = ("system", "developer", "user", "assistant")
_SEEDS = 2**63
_COMPLETION_TOKENS = 16  # the default of the OpenAI API; a chat fills the window


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks, as the headers say. `is_own_id`: the client chose the id, perhaps not for the first
    time. Requests of one `fairness_key` share what keys are given in turn; SLOs are its own, in ms.
    What a body says of `retention_ttl` and `kv_pin` goes before what headers do.
    """

    arrived_ns: int
    request_id: str
    is_own_id: bool = False
    wants_ledger: bool = False
    fairness_key: str = ""
    slo_ttft_ms: float | None = None
    slo_tpot_ms: float | None = None
    retention_s: float | None = None
    kv_pin: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What a client asked for: `requests[i]` makes choice i, `echoes[i]` is the text before it.

    `query_id` begins the id of each request and is unique for ever; `prompts` is the number of
    different prompts, whose choices follow each other.
    """

    query_id: str
    model: str
    requests: tuple[Request, ...]
    prompts: int
    echoes: tuple[str, ...]
    is_stream: bool
    has_usage: bool
    has_running_usage: bool
    skip_special_tokens: bool
    includes_stop: bool
    wants_ledger: bool

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts, each counted once however many choices it has."""
        choices = len(self.requests) // self.prompts
        return sum(len(request.prompt_token_ids) for request in self.requests[::choices])


class Intake:
    """Judges bodies and tokenises prompts for one model."""

    def __init__(self, model: ServedModel, settings: ServerSettings) -> None:
        self.model = model
        self.settings = settings
        self._threads = ThreadPoolExecutor(settings.encode_threads, thread_name_prefix="tokenizer")

    def close(self) -> None:
        """Let the tokenising threads go."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def check_model(self, name: str | None) -> str:
        """Return the name to answer with. Raises: `UnknownModel`."""
        if name is None:
            return self.model.names[0]
        if name not in self.model.names:
            served = ", ".join(self.model.names)
            raise UnknownModel(f"the model `{name}` is not served here; served: {served}", "model")
        return name

    async def chat(self, body: ChatCompletionRequest, caller: Caller) -> Query:
        """Return what a chat body asks for. Raises: `BadRequest` or a subclass."""
        model = self.check_model(body.model)
        refuse_unsupported(body)
        alternatives = _chat_logprobs(body)
        text = self._render(body)
        self._check_length(text, "messages")
        (token_ids,) = await self._encode([text], add_special_tokens=False)
        wanted = body.max_completion_tokens
        wanted, field = (
            (body.max_tokens, "max_tokens") if wanted is None else (wanted, "max_completion_tokens")
        )
        self._check_prompt(token_ids, "messages")
        limit = self._check_room(len(token_ids), wanted, field, "messages")
        params = self._params(body, limit, alternatives)
        return self._query(body, model, "chatcmpl", caller, [(token_ids, params, "")])

    async def completion(self, body: CompletionRequest, caller: Caller) -> Query:
        """Return what a completion body asks for. Raises: `BadRequest` or a subclass."""
        model = self.check_model(body.model)
        refuse_unsupported(body)
        if body.best_of not in (None, body.n or 1):
            raise BadRequest("`best_of` is not supported unless it equals `n`", "best_of")
        if body.echo and body.logprobs is not None:
            raise BadRequest("`echo` with `logprobs` is not supported", "logprobs")
        prompts = await self._prompts(body)
        asked = []
        for token_ids in prompts:
            self._check_prompt(token_ids, "prompt")
            room = self._check_room(len(token_ids), body.max_tokens, "max_tokens", "prompt")
            limit = room if body.max_tokens else min(room, _COMPLETION_TOKENS)
            params = self._params(body, limit, body.logprobs)
            echo = self.model.tokenizer.decode(token_ids) if body.echo else ""
            asked.append((token_ids, params, echo))
        return self._query(body, model, "cmpl", caller, asked)

    async def tokenize(self, body: TokenizeRequest) -> list[int]:
        """Return the tokens of a text or of a conversation. Raises: `BadRequest`."""
        self.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise BadRequest("give either `prompt` or `messages`", "prompt")
        text = self._render(body) if body.prompt is None else body.prompt
        is_special = body.add_special_tokens
        if is_special is None:
            is_special = body.prompt is not None
        (token_ids,) = await self._encode([text], add_special_tokens=is_special)
        return token_ids

    def _render(self, body: ChatCompletionRequest | TokenizeRequest) -> str:
        messages = [_plain(message, index) for index, message in enumerate(body.messages or [])]
        return self.model.tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=body.add_generation_prompt is not False,
            options=body.chat_template_kwargs,
        )

    async def _prompts(self, body: CompletionRequest) -> list[list[int]]:
        """Return the token ids of each prompt, whatever form they came in."""
        prompt: Sequence[Any] = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        if not prompt or not all(isinstance(item, int) or item for item in prompt):
            raise BadRequest("the prompt is empty", "prompt")
        if _are_all(prompt, int):
            return [list(prompt)]
        if len(prompt) > self.settings.max_choices:
            raise BadRequest(
                f"`prompt` has {len(prompt)} entries, {self.settings.max_choices} at most", "prompt"
            )
        if _are_all(prompt, list):
            return list(prompt)
        if not _are_all(prompt, str):
            raise BadRequest("`prompt` mixes texts and token ids", "prompt")
        for text in prompt:
            self._check_length(text, "prompt")
        return await self._encode(prompt, add_special_tokens=body.add_special_tokens is not False)

    async def _encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Tokenise, long texts in a thread so that nobody else's tokens wait for it."""
        tokenizer = self.model.tokenizer
        if sum(map(len, texts)) <= self.settings.encode_inline_chars:
            return tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._threads,
            lambda: tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens),
        )

    def _check_length(self, text: str, field: str) -> None:
        """Refuse a text that no tokenising could make short enough, before time is spent on it."""
        chars, window = self.model.tokenizer.max_token_chars, self.model.max_model_len
        if chars is not None and len(text) > chars * window:
            raise PromptTooLong(
                f"the prompt has {len(text)} characters, far more than the window of {window} "
                "tokens can hold",
                field,
            )

    def _check_prompt(self, token_ids: Sequence[int], field: str) -> None:
        if not token_ids:
            raise BadRequest("the prompt is empty", field)
        if max(token_ids) >= self.model.vocab_size:
            raise BadRequest(
                f"token id {max(token_ids)} is not in the vocabulary of {self.model.vocab_size}",
                field,
            )

    def _check_room(
        self, prompt_tokens: int, max_tokens: int | None, field: str, prompt_field: str
    ) -> int:
        """Return how many tokens may be made."""
        window = self.model.max_model_len
        room = window - prompt_tokens
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {prompt_tokens} tokens, the window is {window} tokens and needs "
                "room for at least one more",
                prompt_field,
            )
        if max_tokens is not None and max_tokens > room:
            raise PromptTooLong(
                f"`{field}` is {max_tokens}, but a prompt of {prompt_tokens} tokens leaves {room} "
                f"of the window of {window}",
                field,
            )
        return room if max_tokens is None else max_tokens

    def _params(
        self, body: GenerationBody, max_tokens: int, logprobs: int | None
    ) -> SamplingParams:
        vocab_size = self.model.vocab_size
        stop_ids = tuple(body.stop_token_ids or ())
        if stop_ids and max(stop_ids) >= vocab_size:
            raise BadRequest(f"{max(stop_ids)} is not a token id", "stop_token_ids")
        if (body.min_tokens or 0) > max_tokens:
            raise BadRequest(
                f"`min_tokens` is {body.min_tokens}, at most {max_tokens} tokens are made",
                "min_tokens",
            )
        stop = body.stop or ()
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=body.min_tokens or 0,
            temperature=_or(body.temperature, 1.0),
            top_p=_or(body.top_p, 1.0),
            top_k=max(0, body.top_k or 0),
            min_p=_or(body.min_p, 0.0),
            repetition_penalty=_or(body.repetition_penalty, 1.0),
            presence_penalty=_or(body.presence_penalty, 0.0),
            frequency_penalty=_or(body.frequency_penalty, 0.0),
            logit_bias=_logit_bias(body.logit_bias, vocab_size) if body.logit_bias else (),
            seed=(secrets.randbits(63) if body.seed is None else body.seed % _SEEDS),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=stop_ids,
            ignore_eos=bool(body.ignore_eos),
            logprobs=logprobs,
        )

    def _query(
        self,
        body: GenerationBody,
        model: str,
        kind: str,
        caller: Caller,
        asked: Sequence[tuple[list[int], SamplingParams, str]],
    ) -> Query:
        if body.stream_options is not None and not body.stream:
            raise BadRequest("`stream_options` is for streams only", "stream_options")
        options, n = body.stream_options, body.n or 1
        count = n * len(asked)
        if count > self.settings.max_choices:
            raise BadRequest(
                f"{count} choices in one request, {self.settings.max_choices} at most", "n"
            )
        ttl_s = caller.retention_s if body.retention_ttl is None else body.retention_ttl
        kv = replace(body, retention_ttl=ttl_s, kv_pin=body.kv_pin or caller.kv_pin or None)
        query_id = f"{kind}-{caller.request_id}"
        if caller.is_own_id:
            # It may come twice, for a retry say; what the cluster sees must be unique.
            query_id += f"-{secrets.token_hex(4)}"
        requests = [
            Request(
                request_id=RequestId(query_id if count == 1 else f"{query_id}-{at * n + i}"),
                prompt_token_ids=tuple(token_ids),
                params=_with_seed(params, i),
                cache_salt=body.cache_salt or "",
                priority=body.priority or 0,
                arrived_ns=caller.arrived_ns,
                fairness_key=caller.fairness_key,
                slo_ttft_ms=caller.slo_ttft_ms,
                slo_tpot_ms=caller.slo_tpot_ms,
            )
            for at, (token_ids, params, _) in enumerate(asked)
            for i in range(n)
        ]
        return Query(
            query_id=query_id,
            model=model,
            requests=tuple(with_kv(request, kv, self.settings) for request in requests),
            prompts=len(asked),
            echoes=tuple(echo for _, _, echo in asked for _ in range(n)),
            is_stream=bool(body.stream),
            has_usage=bool(options and options.include_usage),
            has_running_usage=bool(options and options.continuous_usage_stats),
            skip_special_tokens=body.skip_special_tokens is not False,
            includes_stop=bool(body.include_stop_str_in_output),
            wants_ledger=caller.wants_ledger,
        )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _are_all(items: Sequence[object], kind: type) -> TypeGuard[list[Any]]:
    return all(type(item) is kind for item in items)


def with_kv(request: Request, asked: KVOptions, settings: ServerSettings) -> Request:
    """Return a request with what is asked of its KV. Raises: `BadRequest`."""
    parts = [name for name in ("kv_window", "kv_select") if getattr(asked, name)]
    if parts and asked.kv_quality is not None:
        raise BadRequest("a part of the KV is not exact: leave one of the two out", parts[-1])
    if len(parts) > 1:
        raise BadRequest("ask for `kv_window` or for `kv_select`, not for both", parts[-1])
    if parts and not settings.accepts_window:
        raise BadRequest(
            "no request goes on here without all its KV: that takes --kv-quality and a model "
            "without sliding windows",
            parts[-1],
        )
    if asked.kv_pin and asked.retention_ttl is None:
        raise BadRequest("`kv_pin` needs a `retention_ttl`: 0 lets go of the pin", "kv_pin")
    return replace(
        request,
        accepts_loss=settings.accepts_loss and asked.kv_quality is None,
        kv_window=asked.kv_window or 0,
        kv_select=asked.kv_select or 0,
        retention_ns=int((asked.retention_ttl or 0.0) * NS_PER_S),
        pin=asked.kv_pin or "",
    )


def _with_seed(params: SamplingParams, offset: int) -> SamplingParams:
    if not offset:
        return params
    assert params.seed is not None, "a seed is drawn before choices are made"
    return msgspec.structs.replace(params, seed=(params.seed + offset) % _SEEDS)


def _logit_bias(bias: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    entries = []
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            raise BadRequest(f"`{key[:32]}` is not a token id", "logit_bias")
        entries.append((int(key), value))
    return tuple(entries)


def _chat_logprobs(body: ChatCompletionRequest) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise BadRequest("`top_logprobs` needs `logprobs` to be true", "top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def _plain(message: ChatMessage, index: int) -> dict[str, object]:
    """Return a message as a template wants it."""
    where = f"messages[{index}]."
    if message.role not in _ROLES:
        raise BadRequest(f"`{where}role` is none of {', '.join(_ROLES)}", f"{where}role")
    refuse_unsupported(message, where)
    content: object = message.content
    if isinstance(message.content, list):
        content = list(_text_parts(message, where))
    elif content is None:
        raise BadRequest(f"`{where}content` is missing", f"{where}content")
    fields = {"role": message.role, "content": content, "name": message.name}
    return fields | {"reasoning_content": message.reasoning_content}


def _text_parts(message: ChatMessage, where: str) -> Iterable[dict[str, str]]:
    assert isinstance(message.content, list), message.content
    for index, part in enumerate(message.content):
        path = f"{where}content[{index}]"
        if part.type != "text":
            raise BadRequest(
                f"`{path}.type`: content of type `{part.type[:32]}` is not supported, only `text`",
                f"{path}.type",
            )
        if part.text is None:
            raise BadRequest(f"`{path}.text` is missing", f"{path}.text")
        yield {"type": "text", "text": part.text}
