"""What the server answers with, in the words of the OpenAI API.

The structs are encoded as they are and published by `openapi.py`; `openai.py` fills them in.
"""

from msgspec import UNSET, Struct, UnsetType

Ledger = dict[str, float | str | bool]
"""Parts of the time to first token in seconds, and where and how the KV went."""


class PromptTokensDetails(Struct):
    """Where prompt tokens came from."""

    cached_tokens: int


class Usage(Struct):
    """Tokens of a whole response; a prompt counts once however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Alternative(Struct):
    """A token that might have been."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(Struct):
    """A token that was, and the most likely ones at its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Alternative]


class ChatLogprobs(Struct):
    """Log probabilities in the form of chats."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class AssistantMessage(Struct):
    """What the model said."""

    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(Struct):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatCompletion(Struct, kw_only=True):
    """Answer of `POST /v1/chat/completions`. A stream sends `chat.completion.chunk` events."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    penstock_ledger: Ledger | list[Ledger] | UnsetType = UNSET


class TextLogprobs(Struct):
    """Log probabilities in the form of completions, one entry per token in each list."""

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


class TextChoice(Struct):
    """One continuation."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str | None


class Completion(Struct, kw_only=True):
    """Answer of `POST /v1/completions`. A stream sends events of the same form."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    penstock_ledger: Ledger | list[Ledger] | UnsetType = UNSET


class ModelCard(Struct, kw_only=True):
    """A model that is served."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "penstock"
    root: str
    max_model_len: int


class ModelList(Struct, kw_only=True):
    """Answer of `GET /v1/models`."""

    object: str = "list"
    data: list[ModelCard]


class TokenizeResult(Struct, kw_only=True):
    """Answer of `POST /tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResult(Struct):
    """Answer of `POST /detokenize`."""

    prompt: str


class Health(Struct, omit_defaults=True):
    """Answer of `GET /health`: `ready`, or `unavailable` with a reason."""

    status: str
    reason: str | None = None


class Version(Struct):
    """Answer of `GET /version`."""

    version: str
