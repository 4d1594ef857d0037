"""The description of the API, and the page that shows it."""

import asyncio
import re

import msgspec

from penstock.server.openapi import describe_api
from tests.server.double import ScriptedService, client, make_app, text_script


def _refs(node) -> set[str]:
    if isinstance(node, dict):
        found = {node["$ref"]} if "$ref" in node else set()
        return found.union(*map(_refs, node.values()))
    return set().union(*map(_refs, node)) if isinstance(node, list) else set()


def test_every_reference_is_there_and_every_schema_is_used():
    api = describe_api("1.2.3")
    names = {ref.removeprefix("#/components/schemas/") for ref in _refs(api)}
    assert names == set(api["components"]["schemas"])
    assert api["info"]["version"] == "1.2.3"


def test_it_describes_what_is_served():
    app = make_app(ScriptedService(text_script("x")))
    served = {
        (method.lower(), route.path.replace(":path", ""))
        for route in app.routes
        for method in route.methods - {"HEAD"}
    }
    described = {
        (method, path) for path, methods in describe_api("")["paths"].items() for method in methods
    }
    assert served - described == {("get", "/docs"), ("get", "/openapi.json")}
    assert described <= served


def test_limits_are_published():
    body = describe_api("")["components"]["schemas"]["ChatCompletionRequest"]
    (temperature,) = (t for t in body["properties"]["temperature"]["anyOf"] if "minimum" in t)
    assert (temperature["minimum"], temperature["maximum"]) == (0.0, 100.0)
    assert body["required"] == ["messages"]
    assert body["additionalProperties"] is False


def test_the_page_needs_nothing_from_elsewhere():
    async def story():
        async with client(make_app(ScriptedService(text_script("x")))) as http:
            page, document = await http.get("/docs"), await http.get("/openapi.json")
        assert page.headers["content-type"].startswith("text/html")
        assert not re.search(r"https?://|//cdn|@import|src=", page.text)
        assert msgspec.json.decode(document.content) == describe_api("1.2.3")

    asyncio.run(story())
