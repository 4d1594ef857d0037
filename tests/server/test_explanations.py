"""Why a request went where it went, asked for by the names that a client knows."""

import asyncio

from tests.server.double import ScriptedService, client, explanation_of, make_app, text_script

BODY = {"prompt": "hi", "max_tokens": 2}


def ask(*names: str, body: dict | None = None, own_id: str | None = None) -> list:
    """Complete once, then ask by each name; `{id}` stands for the response's."""

    async def story() -> list:
        async with client(make_app(ScriptedService(text_script("abc")))) as http:
            headers = {} if own_id is None else {"x-request-id": own_id}
            made = await http.post("/v1/completions", json=body or BODY, headers=headers)
            assert made.status_code == 200
            fill = {"id": made.json()["id"], "own": made.headers["x-request-id"]}
            paths = [f"/cluster/requests/{name.format(**fill)}/explanation" for name in names]
            return [await http.get(path) for path in paths]

    return asyncio.run(story())


def test_by_the_id_of_the_response_or_of_the_request():
    by_response, by_header = ask("{id}", "{own}")
    assert by_response.status_code == by_header.status_code == 200
    (one,) = by_response.json()["requests"]
    assert by_header.json()["requests"] == [one]
    wanted = explanation_of(one["request_id"])
    assert (one["prefill_worker"], one["decode_worker"]) == ("prefill-0", "decode-0")
    assert one["predicted"]["ttft_ms"] == wanted.predicted.ttft_ms
    assert [c["worker_id"] for c in one["candidates"]] == [c.worker_id for c in wanted.candidates]


def test_by_an_id_of_the_clients_own_even_with_a_slash_in_it():
    (answer,) = ask("{own}", own_id="batch/7")
    assert answer.json()["id"] == "batch/7"
    assert answer.json()["requests"][0]["request_id"].startswith("cmpl-batch/7-")


def test_every_choice_has_its_own():
    every, second = ask("{id}", "{id}-1", body=BODY | {"n": 3})
    ids = [one["request_id"] for one in every.json()["requests"]]
    assert [name[-2:] for name in ids] == ["-0", "-1", "-2"]
    assert [one["request_id"] for one in second.json()["requests"]] == [ids[1]]


def test_of_what_is_not_known_it_says_where_to_look():
    (answer,) = ask("nobody")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["code"] == "request_not_found"
    assert "--decision-log" in error["message"]


def test_a_request_that_no_worker_has_yet_is_told_apart():
    class Waiting(ScriptedService):
        def explain(self, request_id: object) -> None:
            return None

    async def story():
        async with client(make_app(Waiting(text_script("abc")))) as http:
            made = await http.post("/v1/completions", json=BODY)
            return await http.get(f"/cluster/requests/{made.json()['id']}/explanation")

    answer = asyncio.run(story())
    assert answer.status_code == 404
    assert "has not been given to a worker" in answer.json()["error"]["message"]
