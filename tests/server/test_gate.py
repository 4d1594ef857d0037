"""Who may call what, and the id of a request."""

import asyncio

import httpx
import pytest

from tests.server.double import ScriptedService, client, make_app, text_script

BODY = {"prompt": "hi", "max_tokens": 2}


def _post(headers: dict | None = None, path: str = "/v1/completions", **settings) -> httpx.Response:
    async def story():
        async with client(make_app(ScriptedService(text_script("abc")), **settings)) as http:
            return await http.post(path, json=BODY, headers=headers)

    return asyncio.run(story())


def _get(path: str, **settings) -> httpx.Response:
    async def story():
        async with client(make_app(ScriptedService(text_script("abc")), **settings)) as http:
            return await http.get(path)

    return asyncio.run(story())


@pytest.mark.parametrize(
    "value", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic one", "one", "Bearer onetwo"]
)
def test_without_the_key_there_is_no_answer(value):
    headers = {} if value is None else {"authorization": value}
    answer = _post(headers, api_keys=("one", "two"))
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("value", ["Bearer one", "bearer two", "Bearer  two "])
def test_any_of_the_keys_will_do(value):
    assert _post({"authorization": value}, api_keys=("one", "two")).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/metrics", "/version", "/docs", "/openapi.json"])
def test_probes_need_no_key(path):
    assert _get(path, api_keys=("one",)).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/nowhere", "/health/x"])
def test_everything_else_does(path):
    assert _get(path, api_keys=("one",)).status_code == 401


def test_without_keys_everything_is_open():
    assert _post({"authorization": "Bearer whatever"}).status_code == 200


def test_the_clients_id_comes_back_and_is_in_the_response():
    answer = _post({"x-request-id": "my-id_1"})
    assert answer.headers["x-request-id"] == "my-id_1"
    assert answer.json()["id"].startswith("cmpl-my-id_1-")


def test_a_request_without_an_id_gets_one():
    answer = _post()
    assert answer.json()["id"] == f"cmpl-{answer.headers['x-request-id']}"


@pytest.mark.parametrize("path", ["/v1/completions", "/nowhere", "/v1/models"])
def test_errors_carry_the_id_too(path):
    answer = _post({"x-request-id": "mine"}, path)
    assert answer.headers["x-request-id"] == "mine"


@pytest.mark.parametrize("value", ["x" * 129, "a b", "ünï"])
def test_an_id_that_is_no_id_is_refused(value):
    answer = _post({"x-request-id": value.encode()})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "X-Request-Id"
