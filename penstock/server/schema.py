"""What a client may send: every request body as a strict struct, and how a body becomes one.

The structs are the API: the decoder enforces them and `openapi.py` publishes them. A field that is
not here is refused by name. What needs the model to be judged is judged in `intake.py`.
"""

import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from penstock.core.errors import BadRequest

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
Stops = Annotated[list[StopString], Meta(max_length=16)]
Bias = Annotated[float, Meta(ge=-100.0, le=100.0)]
Neutral = Annotated[Any, Meta(description="Not supported: only a value that asks for nothing.")]
KV_QUALITY: Final = (
    "`exact`: KV is never used that has been through a lossy codec, whatever the server is allowed."
)
KV_WINDOW: Final = (
    "Decode as StreamingLLM does: look at the first block and the last so many tokens alone, and "
    "give back what lies between once the prompt has been read. Lossy: only where the server was "
    "started with a `--kv-quality` other than exact."
)
KV_SELECT: Final = (
    "Keep the KV of about so many tokens of the prompt, as SnapKV chooses them: what its last "
    "tokens look at most, by whole blocks, with the first and the last ones. All of it is read "
    "first; the rest is given back, and not handed off. Lossy: as `kv_window`."
)
RETENTION_MAX_S: Final = 86_400.0
RETENTION_TTL: Final = (
    "Seconds, from the end of this request, for which the KV of prompt and answer is given up only "
    "when nothing else can be: for a session that is known to go on. At most half of a pool."
)
KV_PIN: Final = (
    "A name under which the KV of prompt and answer is given up last of all for `retention_ttl` "
    "seconds: for a prefix that many share. The same name again replaces what it kept, and a ttl "
    "of 0 lets go of it. At most a quarter of a pool."
)
NumAlternatives = Annotated[int, Meta(ge=0, le=20)]


class StreamOptions(Struct, forbid_unknown_fields=True):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class KVOptions(Struct, kw_only=True, forbid_unknown_fields=True):
    """What may be asked of a request's KV."""

    kv_quality: Annotated[Literal["exact"], Meta(description=KV_QUALITY)] | None = None
    kv_window: Annotated[int, Meta(ge=16, le=2**31 - 1, description=KV_WINDOW)] | None = None
    kv_select: Annotated[int, Meta(ge=64, le=2**31 - 1, description=KV_SELECT)] | None = None
    retention_ttl: (
        Annotated[float, Meta(ge=0.0, le=RETENTION_MAX_S, description=RETENTION_TTL)] | None
    ) = None
    kv_pin: Annotated[str, Meta(min_length=1, max_length=128, description=KV_PIN)] | None = None


class RequestOptions(KVOptions, kw_only=True, forbid_unknown_fields=True):
    """What may be asked of a request besides its text: in a body, and of `LLM` by the same names.

    Prefixes are shared among those of one `cache_salt`; a lower `priority` goes first.
    """

    cache_salt: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None


class GenerationBody(RequestOptions, kw_only=True, forbid_unknown_fields=True):
    """What both ways of asking for text have in common. Null means the default.

    `user`, `metadata`, `service_tier`, `safety_identifier` and `prompt_cache_key` are taken and
    have no effect. Fields of `NEUTRAL_VALUES` are taken with those values only.
    """

    model: str | None = None
    n: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=100.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Bias], Meta(max_length=1024)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopString | Stops | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=256)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Neutral = None


class ContentPart(Struct):
    """A part of a message's content; only text is understood."""

    type: str
    text: str | None = None


class ChatMessage(Struct, kw_only=True, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: Neutral = None
    audio: Neutral = None
    tool_calls: Neutral = None
    function_call: Neutral = None


class ChatCompletionRequest(GenerationBody, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=65536)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: NumAlternatives | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Neutral = None
    tool_choice: Neutral = None
    parallel_tool_calls: Neutral = None
    functions: Neutral = None
    function_call: Neutral = None
    response_format: Neutral = None
    modalities: Neutral = None
    audio: Neutral = None
    prediction: Neutral = None
    web_search_options: Neutral = None
    reasoning_effort: Neutral = None
    verbosity: Neutral = None


class CompletionRequest(GenerationBody, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /v1/completions`. `prompt` is one text or one list of token ids, or a list of
    either.
    """

    prompt: str | list[str | TokenId | list[TokenId]]
    logprobs: NumAlternatives | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    best_of: Count | None = None
    suffix: Neutral = None


class TokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /tokenize`: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=65536)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /detokenize`."""

    model: str | None = None
    tokens: list[TokenId]


# What a field that Penstock does not act upon may hold, as it asks for nothing.
NEUTRAL_VALUES: Final[Mapping[str, tuple[object, ...]]] = {
    "store": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "tool_calls": ([],),
    "annotations": ([],),
}

_PATH = re.compile(r"^(?P<message>.*?)(?: - at `(?P<path>[^`]*)`)?$", re.DOTALL)
_NAMED_FIELD = re.compile(r"Object (?:contains unknown|missing required) field `(?P<name>[^`]*)`")

T = TypeVar("T")


def decode_body(decoder: msgspec.json.Decoder[T], body: bytes | bytearray) -> T:
    """Parse a body.

    Raises: `BadRequest` with the path of the field at fault.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None
    except msgspec.DecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    except UnicodeDecodeError:
        raise BadRequest("the body is not JSON: it is not UTF-8") from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None


def request_options(asked: Mapping[str, object]) -> RequestOptions:
    """Return what is asked of a request by name.

    Raises: `BadRequest` with the name at fault.
    """
    try:
        return msgspec.convert(asked, RequestOptions)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None


def refuse_unsupported(body: Struct, prefix: str = "") -> None:
    """Refuse what is known and not supported. Raises: `BadRequest` naming the field."""
    for name in _neutral_fields(type(body)):
        value = getattr(body, name)
        if value is not None and value not in NEUTRAL_VALUES[name]:
            raise BadRequest(f"`{prefix}{name}` is not supported by this server", prefix + name)


@cache
def _neutral_fields(kind: type[Struct]) -> tuple[str, ...]:
    return tuple(name for name in kind.__struct_fields__ if name in NEUTRAL_VALUES)


def _explain(message: str) -> BadRequest:
    match = _PATH.match(message)
    assert match is not None, message
    path = (match["path"] or "$").removeprefix("$").removeprefix(".")
    if named := _NAMED_FIELD.match(message):
        path = f"{path}.{named['name']}" if path else named["name"]
    where = f"`{path}`: " if path else ""
    return BadRequest(f"{where}{match['message']}", path or None)
