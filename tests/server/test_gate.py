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


def _request_of(headers: dict, **settings):
    """Return the request that the cluster is given."""

    async def story():
        service = ScriptedService(text_script("abc"))
        async with client(make_app(service, **settings)) as http:
            answer = await http.post("/v1/completions", json=BODY, headers=headers)
        assert answer.status_code == 200, answer.text
        return service.submitted[0]

    return asyncio.run(story())


def test_slos_and_the_tenant_come_in_headers():
    request = _request_of(
        {"x-slo-ttft-ms": "250", "x-slo-tpot-ms": "12.5", "x-llm-d-inference-fairness-id": "team-a"}
    )
    assert (request.slo_ttft_ms, request.slo_tpot_ms) == (250.0, 12.5)
    assert request.fairness_key == "team-a"


def test_without_headers_the_clusters_slos_hold_and_all_are_one_tenant():
    request = _request_of({})
    assert (request.slo_ttft_ms, request.slo_tpot_ms, request.fairness_key) == (None, None, "")


def test_where_there_are_several_api_keys_they_are_the_tenants_whatever_a_client_says():
    headers = {"authorization": "Bearer two", "x-llm-d-inference-fairness-id": "another"}
    assert _request_of(headers, api_keys=("one", "two")).fairness_key == "key-1"
    assert _request_of(headers, api_keys=("two",)).fairness_key == "another"


@pytest.mark.parametrize("name", ["x-slo-ttft-ms", "x-slo-tpot-ms"])
@pytest.mark.parametrize("value", ["", "soon", "0", "-1", "nan", "inf", "1e12"])
def test_an_slo_that_is_none_is_refused_by_name(name: str, value: str):
    answer = _post({name: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name


def test_a_tenant_with_odd_characters_is_refused():
    answer = _post({"x-llm-d-inference-fairness-id": "a b"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "x-llm-d-inference-fairness-id"


def test_how_long_kv_is_kept_may_be_said_in_headers_and_the_body_goes_before_them():
    headers = {"x-penstock-retention-ttl": "1.5", "x-penstock-kv-pin": "docs"}
    request = _request_of(headers)
    assert (request.retention_ns, request.pin) == (1_500_000_000, "docs")
    assert _request_of({"x-penstock-retention-ttl": "0"}).retention_ns == 0

    async def story():
        service = ScriptedService(text_script("abc"))
        async with client(make_app(service)) as http:
            body = BODY | {"retention_ttl": 2, "kv_pin": "other"}
            await http.post("/v1/completions", json=body, headers=headers)
        return service.submitted[0]

    request = asyncio.run(story())
    assert (request.retention_ns, request.pin) == (2_000_000_000, "other")


@pytest.mark.parametrize(
    ("name", "value"),
    [("x-penstock-retention-ttl", v) for v in ["", "soon", "-1", "nan", "inf", "86401"]]
    + [("x-penstock-kv-pin", v) for v in ["", "a b", "x" * 129]],
)
def test_what_cannot_be_kept_so_is_refused_by_name(name: str, value: str):
    answer = _post({"x-penstock-retention-ttl": "1", name: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name


def test_a_pin_in_a_header_needs_a_time():
    answer = _post({"x-penstock-kv-pin": "docs"})
    assert answer.json()["error"]["param"] == "kv_pin"
