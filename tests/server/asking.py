"""Queries for tests of what lies behind the intake."""

from penstock.core.messages import TokenOutput
from penstock.core.request import Request, SamplingParams
from penstock.core.types import FinishReason, RequestId
from penstock.server.choice import Choice
from penstock.server.intake import Query
from tests.server.double import byte_model, logprobs_of, timeline_of


def query_of(*, n: int = 1, prompt: str = "hi", params: dict | None = None, **changes) -> Query:
    """Make a query of `n` choices of one prompt."""
    requests = [
        Request(
            request_id=RequestId(f"cmpl-q-{i}"),
            prompt_token_ids=tuple(prompt.encode()),
            params=SamplingParams(**({"max_tokens": 100, "seed": i} | (params or {}))),
            arrived_ns=1,
        )
        for i in range(n)
    ]
    fields = {
        "query_id": "cmpl-q",
        "model": "tiny",
        "requests": tuple(requests),
        "prompts": 1,
        "echoes": ("",) * n,
        "is_stream": True,
        "has_usage": False,
        "has_running_usage": False,
        "skip_special_tokens": True,
        "includes_stop": False,
        "wants_ledger": False,
    }
    return Query(**(fields | changes))


def choice_of(query: Query | None = None, index: int = 0) -> Choice:
    """Make a choice that has got nothing yet."""
    return Choice(index, query or query_of(), byte_model())


def output_of(
    choice: Choice, text: str | bytes | list[int], reason: FinishReason | None = None
) -> TokenOutput:
    """Make an output of the bytes of `text`, with the log probabilities that were asked for."""
    ids = list(text.encode() if isinstance(text, str) else text)
    wanted = choice.request.params.logprobs
    return TokenOutput(
        request_id=choice.request.request_id,
        token_ids=tuple(ids),
        logprobs=tuple(logprobs_of(i, wanted) for i in ids) if wanted is not None else (),
        finish_reason=reason,
        timeline=timeline_of(choice.request) if not choice.num_tokens else None,
    )
