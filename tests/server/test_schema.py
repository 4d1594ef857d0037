"""Bodies and what is said about bad ones."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import BadRequest
from penstock.server.schema import (
    NEUTRAL_VALUES,
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    decode_body,
    refuse_unsupported,
)

CHATS = msgspec.json.Decoder(ChatCompletionRequest)
TEXTS = msgspec.json.Decoder(CompletionRequest)
HELLO = '"messages":[{"role":"user","content":"hi"}]'


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", None),
        (b"{", None),
        (b"\xff\xfe", None),
        (b'{"model": "\xff"}', None),
        (b'{"model": "\\ud800"}', None),
        (b"[]", None),
        (b"[" * 1_000_000, None),
        (b'{"a":' * 200_000, "a"),
        (b"{}", "messages"),
        (b'{"messages": []}', "messages"),
        (b'{"messages": [{"content": "x"}]}', "messages[0].role"),
        (b'{"messages": [{"role": 1}]}', "messages[0].role"),
        (b'{"messages": [{"role": "user", "contents": "x"}]}', "messages[0].contents"),
        (b'{"messages": [{"role": "user", "content": [{}]}]}', "messages[0].content[0].type"),
    ],
)
def test_a_bad_body_is_explained(body, field):
    with pytest.raises(BadRequest) as refused:
        decode_body(CHATS, body)
    assert refused.value.field == field
    assert field is None or field in str(refused.value)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ('"temperature": -0.1', "temperature"),
        ('"temperature": "hot"', "temperature"),
        ('"temperature": 1e999', "temperature"),
        ('"top_p": 0', "top_p"),
        ('"top_p": 1.1', "top_p"),
        ('"top_k": -2', "top_k"),
        ('"min_p": 2', "min_p"),
        ('"n": 0', "n"),
        ('"n": 1.5', "n"),
        ('"n": true', "n"),
        ('"max_tokens": 0', "max_tokens"),
        ('"max_tokens": -5', "max_tokens"),
        ('"max_tokens": 99999999999999999999999', "max_tokens"),
        ('"max_completion_tokens": 0', "max_completion_tokens"),
        ('"min_tokens": -1', "min_tokens"),
        ('"repetition_penalty": 0', "repetition_penalty"),
        ('"presence_penalty": 2.5', "presence_penalty"),
        ('"frequency_penalty": -2.5', "frequency_penalty"),
        ('"logit_bias": {"1": 101}', "logit_bias[...]"),
        ('"logit_bias": [1]', "logit_bias"),
        ('"seed": "x"', "seed"),
        ('"stop": [""]', "stop[0]"),
        ('"stop": 3', "stop"),
        (f'"stop": {["x"] * 17}'.replace("'", '"'), "stop"),
        ('"stop_token_ids": [-1]', "stop_token_ids[0]"),
        ('"stream": "yes"', "stream"),
        ('"stream_options": {"x": 1}', "stream_options.x"),
        ('"logprobs": 3', "logprobs"),
        ('"top_logprobs": 21', "top_logprobs"),
        ('"cache_salt": ""', "cache_salt"),
        ('"made_up": 1', "made_up"),
    ],
)
def test_a_bad_value_names_its_field(value, field):
    with pytest.raises(BadRequest) as refused:
        decode_body(CHATS, f"{{{HELLO}, {value}}}".encode())
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("reasoning_effort", "high"),
        ("store", True),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name, value):
    body = msgspec.json.encode({"messages": [{"role": "user", "content": "x"}], name: value})
    with pytest.raises(BadRequest, match=f"`{name}` is not supported") as refused:
        refuse_unsupported(decode_body(CHATS, body))
    assert refused.value.field == name


def test_what_asks_for_nothing_is_taken():
    fields = {name for cls in (ChatCompletionRequest, CompletionRequest, ChatMessage)
              for name in cls.__struct_fields__}  # fmt: skip
    assert set(NEUTRAL_VALUES) <= fields, "every neutral field is a field"
    for name, values in NEUTRAL_VALUES.items():
        for value in (*values, None):
            body = msgspec.json.encode({"messages": [{"role": "u", "content": "x"}], name: value})
            if name in ChatCompletionRequest.__struct_fields__:
                refuse_unsupported(decode_body(CHATS, body))


@pytest.mark.parametrize("prompt", ["hi", ["hi", "ho"], [1, 2], [[1, 2], [3]], [], ["hi", 1]])
def test_every_form_of_prompt_decodes(prompt):
    body = decode_body(TEXTS, msgspec.json.encode({"prompt": prompt}))
    assert body.prompt == prompt


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(data):
    for decoder in (CHATS, TEXTS):
        with pytest.raises(BadRequest):
            decode_body(decoder, data)
