"""The forms of responses, chunks and log probabilities."""

import json

import msgspec
import pytest

from penstock.core.errors import PeerLost
from penstock.core.step import TokenLogprobs
from penstock.core.types import FinishReason
from penstock.server.choice import TokenReport
from penstock.server.openai import (
    CHAT,
    TEXT,
    ChunkWriter,
    chat_logprobs,
    ledger,
    text_logprobs,
    usage,
)
from tests.server.asking import choice_of, output_of, query_of
from tests.server.double import byte_tokenizer

TOKENIZER = byte_tokenizer()
LENGTH = FinishReason.LENGTH
PARTS = ["queue", "prefill", "offer", "wait_for_room", "pull", "first_decode", "residual"]


def _finished(query, text: str = "abc") -> list:
    choices = [choice_of(query, index) for index in range(len(query.requests))]
    for choice in choices:
        choice.take(output_of(choice, text, LENGTH))
        choice.first_ns = choice.timeline.first_token_ns + 5
    return choices


def _events(*parts: bytes) -> list:
    lines = [e.removeprefix("data: ") for e in b"".join(parts).decode().split("\n\n") if e]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_usage_counts_a_prompt_once():
    query = query_of(n=4)
    assert msgspec.to_builtins(usage(query, _finished(query))) == {
        "prompt_tokens": 2,
        "completion_tokens": 12,
        "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_the_ledger_adds_up():
    query = query_of(n=1)
    entry = ledger(_finished(query))
    assert sum(entry[part] for part in PARTS) == pytest.approx(entry["ttft"], abs=1e-9)
    assert entry["residual"] == pytest.approx(5e-9)
    assert (entry["prefill_worker"], entry["decode_worker"]) == ("prefill-0", "decode-0")
    assert (entry["transport"], entry["pull_bytes"], entry["pull_spans"]) == ("shm", 4096, 2)
    assert entry["pull_bytes_per_s"] == pytest.approx(4096 / 0.0002)
    assert entry["pull_verified"] is False
    assert entry["cached_tokens"] == 3
    assert len(ledger(_finished(query_of(n=2)))) == 2, "one for each choice"


@pytest.mark.parametrize("form", [CHAT, TEXT])
@pytest.mark.parametrize("wants", [True, False])
def test_the_ledger_is_there_only_if_asked_for(form, wants):
    query = query_of(wants_ledger=wants)
    choices = _finished(query)
    body = json.loads(form.whole(query, 0, choices, ["abc"], TOKENIZER))
    assert ("penstock_ledger" in body) is wants
    closing = ChunkWriter(form.chunks, query, 0, TOKENIZER).closing(choices, choices[0])
    last, _ = _events(closing)
    assert ("penstock_ledger" in last) is wants
    with_usage = query_of(wants_ledger=wants, has_usage=True)
    closing = ChunkWriter(form.chunks, with_usage, 0, TOKENIZER).closing(choices, choices[0])
    end, total, _ = _events(closing)
    assert "penstock_ledger" not in end
    assert ("penstock_ledger" in total) is wants


def test_a_whole_completion_has_its_echo():
    query = query_of(n=2, echoes=("hi", "hi"))
    body = json.loads(TEXT.whole(query, 7, _finished(query), ["abc", "abd"], TOKENIZER))
    assert [choice["text"] for choice in body["choices"]] == ["hiabc", "hiabd"]
    assert (body["id"], body["object"], body["created"]) == ("cmpl-q", "text_completion", 7)
    assert body["choices"][1] == {
        "index": 1, "text": "hiabd", "logprobs": None, "finish_reason": "length",
    }  # fmt: skip


def test_a_stream_of_completions_echoes_first():
    query = query_of(echoes=('h"i',))
    writer, choice = ChunkWriter(TEXT.chunks, query, 0, TOKENIZER), choice_of(query)
    (event,) = _events(writer.opening(choice))
    assert event["choices"] == [
        {"index": 0, "text": 'h"i', "logprobs": None, "finish_reason": None}
    ]
    assert ChunkWriter(TEXT.chunks, query_of(), 0, TOKENIZER).opening(choice) == b""


@pytest.mark.parametrize("text", ["plain", 'quote " backslash \\', "\u2028\n\t\0", "好😀"])
def test_any_text_survives_a_chunk(text):
    writer = ChunkWriter(CHAT.chunks, query_of(model='a"b'), 9, TOKENIZER)
    (event,) = _events(writer.text(choice_of(), text, ()))
    assert event == {
        "id": "cmpl-q",
        "object": "chat.completion.chunk",
        "created": 9,
        "model": 'a"b',
        "choices": [
            {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
        ],
    }


def test_running_usage_is_in_every_chunk():
    query = query_of(has_usage=True, has_running_usage=True)
    writer, choice = ChunkWriter(CHAT.chunks, query, 0, TOKENIZER), choice_of(query)
    choice.take(output_of(choice, "ab"))
    (event,) = _events(writer.text(choice, "ab", ()))
    assert event["usage"]["completion_tokens"] == 2
    (event,) = _events(writer.ending(choice))
    assert event["usage"]["total_tokens"] == 4


def test_a_failure_ends_a_stream_with_an_error_object():
    event, done = _events(ChunkWriter(CHAT.chunks, query_of(), 0, TOKENIZER).failure(PeerLost("x")))
    assert event["error"]["message"] == "x"
    assert done == "[DONE]"


def test_logprobs_of_chats_carry_bytes():
    reports = [TokenReport(0, 0xC3, TokenLogprobs(-0.5, ((0xC3, -0.5), (65, -float("inf")))))]
    (entry,) = msgspec.to_builtins(chat_logprobs(TOKENIZER, reports))["content"]
    assert entry == {
        "token": "\ufffd",
        "logprob": -0.5,
        "bytes": [0xC3],
        "top_logprobs": [
            {"token": "\ufffd", "logprob": -0.5, "bytes": [0xC3]},
            {"token": "A", "logprob": -9999.0, "bytes": [65]},
        ],
    }


def test_logprobs_of_completions_are_lists():
    reports = [
        TokenReport(0, 65, TokenLogprobs(-3.0, ((66, -1.0), (67, -2.0)))),
        TokenReport(1, 0xC3, TokenLogprobs(-0.25)),
    ]
    assert msgspec.to_builtins(text_logprobs(TOKENIZER, reports)) == {
        "text_offset": [0, 1],
        "token_logprobs": [-3.0, -0.25],
        "tokens": ["A", "bytes:\\xc3"],
        "top_logprobs": [{"B": -1.0, "C": -2.0, "A": -3.0}, {"bytes:\\xc3": -0.25}],
    }


@pytest.mark.parametrize("form", [CHAT, TEXT])
def test_logprobs_reach_the_response(form):
    query = query_of(params={"logprobs": 2})
    body = json.loads(form.whole(query, 0, _finished(query, "ab"), ["ab"], TOKENIZER))
    logprobs = body["choices"][0]["logprobs"]
    tokens = logprobs["tokens"] if form is TEXT else [e["token"] for e in logprobs["content"]]
    assert tokens == ["a", "b"]
    writer, choice = ChunkWriter(form.chunks, query, 0, TOKENIZER), choice_of(query)
    choice.take(output_of(choice, "q"))
    (event,) = _events(writer.text(choice, "q", choice.release_reports()))
    logprobs = event["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["q"] if form is TEXT else logprobs["content"][0]["token"] == "q"
