"""The table of errors, and every kind of bad request over HTTP."""

import asyncio
import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.core import errors as core_errors
from penstock.core.errors import (
    BadRequest,
    CapacityExceeded,
    PenstockError,
    PromptTooLong,
    WorkersUnavailable,
)
from penstock.server.errors import (
    ERROR_KINDS,
    error_body,
    error_headers,
    error_kind,
    http_error_body,
)
from tests.server.double import ScriptedService, call, client, make_app, text_script

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


def _core_classes() -> list[type[PenstockError]]:
    found = vars(core_errors).values()
    return [c for c in found if isinstance(c, type) and issubclass(c, PenstockError)]


@pytest.mark.parametrize("cls", _core_classes())
def test_every_class_of_the_core_has_its_own_entry(cls):
    assert cls in ERROR_KINDS


def test_a_subclass_takes_its_parents_entry():
    class Special(PromptTooLong):
        pass

    assert error_kind(Special("x")) is ERROR_KINDS[PromptTooLong]


def test_the_error_object_is_openais():
    assert json.loads(error_body(BadRequest("too hot", "temperature"))) == {
        "error": {
            "message": "too hot",
            "type": "invalid_request_error",
            "param": "temperature",
            "code": "invalid_value",
        }
    }


def test_only_the_servers_own_faults_are_5xx():
    client = {c for c, kind in ERROR_KINDS.items() if kind.status < 500}
    assert {c.__name__ for c in client} == {
        "BadRequest", "PromptTooLong", "UnknownModel", "UnknownWorker", "UnknownRequest",
        "BodyTooLarge", "BodyTooSlow", "Unauthorized", "CapacityExceeded",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "header", "header_ms"), [(0.2, b"1", b"200"), (2.5, b"3", b"2500"), (0, b"1", b"1")]
)
def test_capacity_says_when_to_come_back(seconds, header, header_ms):
    headers = dict(error_headers(CapacityExceeded("full", seconds)))
    assert headers == {b"retry-after": header, b"retry-after-ms": header_ms}


def test_router_errors_have_the_same_form():
    error = json.loads(http_error_body(405, "GET /x: no"))["error"]
    assert error == {
        "message": "GET /x: no",
        "type": "invalid_request_error",
        "param": None,
        "code": "method_not_allowed",
    }
    assert json.loads(http_error_body(500))["error"]["type"] == "server_error"


# ------------------------------------------------------------------------------------- over HTTP

BAD_CHATS = {
    "not json": (b"{", 400, None),
    "empty": (b"", 400, None),
    "junk": (b"x" * 1_000_000, 400, None),
    "deep": (b'{"messages":' + b"[" * 500_000, 400, "messages[0]"),
    "latin-1": (b'{"model":"\xe9"}', 400, None),
    "array": (b"[]", 400, None),
    "no messages": ({}, 400, "messages"),
    "unknown model": ({"model": "gpt-5", "messages": MESSAGES}, 404, "model"),
    "unknown field": ({"messages": MESSAGES, "foo": 1}, 400, "foo"),
    "tools": ({"messages": MESSAGES, "tools": [{}]}, 400, "tools"),
    "json mode": (
        {"messages": MESSAGES, "response_format": {"type": "json_object"}},
        400,
        "response_format",
    ),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        400,
        "messages[0].content[0].type",
    ),
    "hot": ({"messages": MESSAGES, "temperature": 101}, 400, "temperature"),
    "many": ({"messages": MESSAGES, "n": 1000}, 400, "n"),
    "long": ({"messages": [{"role": "user", "content": "x" * 300}]}, 400, "messages"),
    "too much": ({"messages": MESSAGES, "max_tokens": 300}, 400, "max_tokens"),
    "bias": ({"messages": MESSAGES, "logit_bias": {"999": 1}}, 400, "logit_bias"),
    "usage alone": (
        {"messages": MESSAGES, "stream_options": {"include_usage": True}},
        400,
        "stream_options",
    ),
}


@pytest.mark.parametrize("name", BAD_CHATS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_is_told_what_to_change_and_serving_goes_on(name, stream):
    body, status, param = BAD_CHATS[name]
    if isinstance(body, dict):
        body = json.dumps(body | ({"stream": True} if stream and name != "usage alone" else {}))

    async def story():
        service = ScriptedService(text_script("ok"))
        async with client(make_app(service)) as http:
            bad = await http.post(CHAT, content=body)
            good = await http.post(CHAT, json={"messages": MESSAGES})
        return service, bad, good

    service, bad, good = asyncio.run(story())
    error = bad.json()["error"]
    assert (bad.status_code, error["param"]) == (status, param)
    assert error["message"]
    assert len(error["message"]) < 300
    assert good.json()["choices"][0]["message"]["content"] == "ok"
    assert len(service.submitted) == 1, "a bad request never reaches the cluster"


def test_a_body_beyond_the_limit_is_413():
    answer = call("POST", CHAT, content=b"x" * 2000, options={"max_body_bytes": 1000})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_a_full_cluster_says_when_to_come_back():
    service = ScriptedService(text_script("x"))
    service.refusal = CapacityExceeded("every queue is full", 2.2)
    answer = call("POST", CHAT, service, json={"messages": MESSAGES, "stream": True})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
    assert answer.json()["error"]["code"] == "capacity_exceeded"


def test_a_full_front_refuses_too():
    answer = call("POST", CHAT, json={"messages": MESSAGES}, options={"max_requests": 0})
    assert answer.status_code == 429


def test_no_worker_is_503_and_a_lost_one_502():
    service = ScriptedService(text_script("x" * 50))
    service.refusal = WorkersUnavailable("no worker is up")
    assert call("POST", CHAT, service, json={"messages": MESSAGES}).status_code == 503
    service.refusal, service.failure_after = None, 3
    answer = call("POST", CHAT, service, json={"messages": MESSAGES})
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "worker_lost")


def test_a_bug_is_an_error_object_too():
    def stumble(request, sink):
        raise RuntimeError("a bug")

    async def story():
        service = ScriptedService(text_script("x"))
        service.submit = stumble
        transport = httpx.ASGITransport(app=make_app(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.post(CHAT, json={"messages": MESSAGES})

    answer = asyncio.run(story())
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, "internal error")


NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)  # what JSON can say
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4)
    ),
    max_leaves=8,
)
NAMES = [
    "model", "n", "stream", "stream_options", "max_tokens", "min_tokens", "temperature", "top_p",
    "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias",
    "seed", "stop", "stop_token_ids", "ignore_eos", "skip_special_tokens", "cache_salt",
    "logprobs", "top_logprobs", "echo", "messages", "prompt", "tools", "response_format", "user",
    "priority", "best_of", "include_stop_str_in_output", "chat_template_kwargs", "metadata",
]  # fmt: skip
GOOD = st.fixed_dictionaries(
    {},
    optional={
        "n": st.integers(1, 3),
        "stream": st.booleans(),
        "max_tokens": st.integers(1, 5),
        "stop": st.lists(st.text(min_size=1, max_size=3), max_size=3),
        "logit_bias": st.dictionaries(st.integers(0, 299).map(str), st.integers(-9, 9)),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "prompt": st.text(max_size=5) | st.lists(st.integers(0, 310), max_size=4),
        "messages": st.lists(
            st.fixed_dictionaries(
                {"role": st.sampled_from(["user", "system", "x"]), "content": st.text(max_size=9)}
            ),
            max_size=3,
        ),
        "logprobs": st.booleans() | st.integers(0, 4),
        "echo": st.booleans(),
    },
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    path=st.sampled_from([CHAT, "/v1/completions", "/tokenize", "/detokenize"]),
    good=GOOD,
    bad=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=2),
)
def test_no_body_makes_the_server_fail(path, good, bad):
    service = ScriptedService(text_script("héllo wörld 😀"), chunks=4)
    answer = call("POST", path, service, json=good | bad)
    assert answer.status_code < 500, answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
    assert service.num_live == 0
