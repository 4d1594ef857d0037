"""The application as a client sees it: every endpoint, and the real `openai` client on a socket."""

import asyncio
import json
import logging
import socket
import threading
import time
from contextlib import closing, contextmanager

import httpx
import openai
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from penstock.core.errors import CapacityExceeded
from penstock.server.app import uvicorn_config
from tests.server.double import ScriptedService, call, client, make_app, text_script

TEXT = "héllo wörld, 好😀 and more"
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


# ------------------------------------------------------------------------------------- small ones


def test_health_says_whether_a_request_could_be_served():
    service = ScriptedService(text_script("x"))
    answer = call("GET", "/health", service)
    assert (answer.status_code, answer.json()) == (200, {"status": "ready"})
    service.is_draining = True
    answer = call("GET", "/health", service)
    assert answer.status_code == 503
    assert answer.json() == {"status": "unavailable", "reason": "the server is shutting down"}


def test_version_and_models():
    assert call("GET", "/version").json() == {"version": "1.2.3"}
    models = call("GET", "/v1/models").json()
    assert [card["id"] for card in models["data"]] == ["tiny", "alias"]
    assert models["data"][0]["max_model_len"] == 256
    assert call("GET", "/v1/models/alias").json()["root"] == "tiny"
    assert call("GET", "/v1/models/org/other").status_code == 404


def test_tokens_and_back():
    answer = call("POST", "/tokenize", json={"prompt": "é||<end>", "return_token_strs": True})
    assert answer.json() == {
        "count": 4,
        "max_model_len": 256,
        "tokens": [195, 169, 257, 256],
        "token_strs": ["\ufffd", "\ufffd", "||", "<end>"],
    }
    answer = call("POST", "/detokenize", json={"tokens": [195, 169, 257, 256]})
    assert answer.json() == {"prompt": "é||<end>"}
    answer = call("POST", "/tokenize", json={"messages": MESSAGES, "add_generation_prompt": False})
    assert answer.json()["tokens"] == list(b"u:hi\n")
    long = call("POST", "/tokenize", json={"prompt": "x" * 100_000})
    assert long.json()["count"] == 100_000, "tokenising has no window"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "x"}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [300]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
    ],
)
def test_bad_requests_for_tokens(path, body, param):
    answer = call("POST", path, json=body)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("GET", "/", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/../../etc/passwd", 404),
    ],
)
def test_wrong_paths_and_methods_are_error_objects(method, path, status):
    answer = call(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert ("allow" in answer.headers) is (status == 405)


def test_metrics_tell_what_happened():
    async def story():
        async with client(make_app(ScriptedService(text_script(TEXT)))) as http:
            await http.post(CHAT, json={"messages": MESSAGES})
            await http.post(CHAT, json={"messages": []})
            return await http.get("/metrics")

    text = asyncio.run(story()).text
    values = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert values["penstock:generation_tokens_total"] == len(TEXT.encode()) + 1
    assert values["penstock:request_success_total"] == 1
    assert values["penstock:request_failure_total"] == 1
    assert values["penstock:time_to_first_token_seconds_count"] == 1


def test_a_request_is_logged_if_asked_for(caplog):
    with caplog.at_level(logging.INFO, "penstock.requests"):
        call("POST", CHAT, json={"messages": MESSAGES}, options={"is_logging_requests": True})
        call("POST", CHAT, json={"messages": MESSAGES})
    (record,) = [r for r in caplog.records if r.name == "penstock.requests"]
    assert "finish=stop" in record.getMessage()


# ------------------------------------------------------------------------------ over a real socket


class Running:
    """An application behind uvicorn, in a thread with a loop of its own."""

    def __init__(self, service: ScriptedService, port: int, **options) -> None:
        self.service = service
        self.url = f"http://127.0.0.1:{port}"
        config = uvicorn_config(make_app(service, **options), host="127.0.0.1", port=port)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve()))

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="key", max_retries=0, timeout=20)


@contextmanager
def running(service: ScriptedService, port: int, **options):
    """Serve until the end of the block."""
    server = Running(service, port, **options)
    server.thread.start()
    try:
        _until(lambda: server.server.started)
        yield server
    finally:
        server.server.should_exit = True
        server.thread.join(20)
        assert not server.thread.is_alive()


def _until(condition, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@pytest.fixture
def served(free_port):
    with running(ScriptedService(text_script(TEXT)), free_port) as server:
        yield server


def test_openai_chat(served):
    with served.openai as api:
        chat = api.chat.completions.create(
            model="tiny", messages=MESSAGES, n=2, seed=5, logprobs=True, top_logprobs=2,
            extra_headers={"x-penstock-ledger": "1", "x-request-id": "mine"},
        )  # fmt: skip
        assert [choice.message.content for choice in chat.choices] == [TEXT, TEXT]
        assert chat.id.startswith("chatcmpl-mine-")
        assert chat.usage.completion_tokens == 2 * (len(TEXT.encode()) + 1)
        assert chat.usage.prompt_tokens_details.cached_tokens == 3
        logprobs = chat.choices[1].logprobs.content
        assert b"".join(bytes(entry.bytes) for entry in logprobs).decode() == TEXT
        assert len(logprobs[0].top_logprobs) == 2
        for entry in chat.penstock_ledger:
            parts = ("queue", "prefill", "offer", "wait_for_room", "pull", "first_decode")
            total = sum(entry[part] for part in parts) + entry["residual"]
            assert total == pytest.approx(entry["ttft"], abs=1e-9)
            assert entry["ttft"] > 0
    assert [r.params.seed for r in served.service.submitted] == [5, 6]


def test_openai_chat_stream(served):
    with served.openai as api:
        stream = api.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, stop=["and", "xyz"],
            stream_options={"include_usage": True}, extra_headers={"x-penstock-ledger": "1"},
        )  # fmt: skip
        chunks = list(stream)
    expected = TEXT.split("and")[0]
    assert chunks[0].choices[0].delta.role == "assistant"
    contents = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(contents) == expected
    assert all("\ufffd" not in content for content in contents)
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(expected.encode()) + 3
    assert chunks[-1].penstock_ledger["decode_worker"] == "decode-0"
    _until(lambda: served.service.num_live == 0)
    assert len(served.service.cancelled) == 1


def test_openai_completions(served):
    with served.openai as api:
        done = api.completions.create(
            model="alias", prompt=["ab", "cd"], max_tokens=4, echo=True, temperature=0
        )
        assert [c.text for c in done.choices] == ["abhél", "cdhél"]
        assert {c.finish_reason for c in done.choices} == {"length"}
        assert (done.model, done.usage.prompt_tokens) == ("alias", 4)
        done = api.completions.create(model="tiny", prompt=[104, 105], logprobs=3, max_tokens=4)
        assert done.choices[0].logprobs.tokens == ["h", "bytes:\\xc3", "bytes:\\xa9", "l"]
        assert done.choices[0].logprobs.text_offset == [0, 1, 1, 2]
        stream = api.completions.create(model="tiny", prompt="x", stream=True, logprobs=0)
        chunks = list(stream)
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text == TEXT.encode()[:16].decode("utf-8", "replace")
    tokens = [t for chunk in chunks if chunk.choices[0].logprobs
              for t in chunk.choices[0].logprobs.tokens]  # fmt: skip
    assert len(tokens) == 16


def test_openai_errors_have_their_classes(served):
    with served.openai as api:
        with pytest.raises(openai.NotFoundError) as missing:
            api.chat.completions.create(model="gpt-5", messages=MESSAGES)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            api.chat.completions.create(model="tiny", messages=MESSAGES, temperature=-1)
        assert bad.value.param == "temperature"
        served.service.refusal = CapacityExceeded("full", 0.1)
        with pytest.raises(openai.RateLimitError):
            api.chat.completions.create(model="tiny", messages=MESSAGES)
        served.service.refusal, served.service.failure_after = None, 2
        stream = api.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="the worker is gone"):
            list(stream)


def test_openai_key(free_port):
    service = ScriptedService(text_script("x"))
    with running(service, free_port, api_keys=("key", "other")) as server, server.openai as api:
        assert api.models.list().data[0].id == "tiny"
        with pytest.raises(openai.AuthenticationError):
            api.with_options(api_key="wrong").models.list()


def test_a_client_that_hangs_up_cancels_its_request(free_port):
    service = ScriptedService(text_script("x"), is_endless=True)
    with running(service, free_port) as server, server.openai as api:
        stream = api.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        next(stream)
        assert service.num_live == 1
        stream.close()
        _until(lambda: service.num_live == 0)
        assert len(service.cancelled) == 1


def test_a_reader_that_never_reads_does_not_fill_the_memory(free_port, caplog):
    service = ScriptedService(text_script("x" * 20), is_endless=True)
    with running(service, free_port, stream_buffer_bytes=100_000):
        body = json.dumps({"messages": MESSAGES, "stream": True, "max_tokens": 200}).encode()
        request = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (
            CHAT.encode(), len(body), body,
        )  # fmt: skip
        with closing(socket.create_connection(("127.0.0.1", free_port))) as reader:
            reader.sendall(request)
            _until(lambda: len(service.cancelled) == 1, 30)
    assert "bytes behind: gave it up" in caplog.text


def test_a_connection_serves_one_request_after_another(served):
    with httpx.Client(base_url=served.url) as http:
        for _ in range(3):
            assert http.post(CHAT, content=b"{").status_code == 400
            assert http.post(CHAT, json={"messages": MESSAGES}).status_code == 200
            assert http.post(CHAT, json={"messages": MESSAGES, "stream": True}).text.endswith(
                "data: [DONE]\n\n"
            )


def test_a_body_that_is_too_large_leaves_the_connection_in_order(free_port):
    service = ScriptedService(text_script("x"))
    with (
        running(service, free_port, max_body_bytes=10_000) as server,
        httpx.Client(base_url=server.url) as http,
    ):
        assert http.post(CHAT, content=b"x" * 3_000_000).status_code == 413
        assert http.post(CHAT, content=(b"x" * 1000 for _ in range(20))).status_code == 413
        assert http.post(CHAT, json={"messages": MESSAGES}).status_code == 200
