"""The gate in front of an application that is not there yet."""

import asyncio
import json

from penstock.cli.loading import LoadingGate

SCOPE = {"type": "http", "method": "GET", "path": "/health", "headers": []}


def ask(gate: LoadingGate) -> list[dict[str, object]]:
    sent: list[dict[str, object]] = []

    async def receive() -> dict[str, object]:
        return {"type": "http.request"}

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    asyncio.run(gate(SCOPE, receive, send))
    return sent


def test_it_says_503_until_there_is_an_application():
    stages = iter(["reading weights", "packing"])
    gate = LoadingGate(lambda: f"loading: {next(stages)}")
    for stage in ("reading weights", "packing"):
        start, body = ask(gate)
        assert start["status"] == 503
        assert (b"retry-after", b"1") in start["headers"]
        assert stage in json.loads(body["body"])["error"]["message"]

    async def application(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})

    gate.app = application
    assert ask(gate)[0]["status"] == 204
