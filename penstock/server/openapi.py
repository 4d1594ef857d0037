"""Describes the API in OpenAPI 3.1, from the very structs that decode and encode.

Owns the list of operations in words. `app.py` serves the result at `/openapi.json`, and the page at
`/docs` shows it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from penstock.server.cluster import (
    ClusterView,
    RoleSwitched,
    StartWorkers,
    SwitchRole,
    WorkerLeaves,
    WorkersStarted,
)
from penstock.server.errors import ERROR_KINDS, ErrorBody
from penstock.server.explanations import ExplainedRequests
from penstock.server.links import LinksView, TryLinksBody
from penstock.server.residency import PARAMETERS, KVResidencyView
from penstock.server.results import (
    ChatCompletion,
    Completion,
    DetokenizeResult,
    Health,
    ModelCard,
    ModelList,
    TokenizeResult,
    Version,
)
from penstock.server.schema import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)


@dataclass(frozen=True, slots=True)
class _Operation:
    method: str
    path: str
    summary: str
    body: type | None
    result: type | str
    is_stream: bool = False
    query: Mapping[str, str] = field(default_factory=dict)


_OPERATIONS = (
    _Operation(
        "post", "/v1/chat/completions", "Continue a conversation",
        ChatCompletionRequest, ChatCompletion, is_stream=True,
    ),
    _Operation(
        "post", "/v1/completions", "Continue texts or tokens",
        CompletionRequest, Completion, is_stream=True,
    ),
    _Operation("get", "/v1/models", "List the models served", None, ModelList),
    _Operation("get", "/v1/models/{model}", "Show one model", None, ModelCard),
    _Operation(
        "post", "/tokenize", "Tokens of a text or conversation", TokenizeRequest, TokenizeResult
    ),
    _Operation("post", "/detokenize", "Text of tokens", DetokenizeRequest, DetokenizeResult),
    _Operation("get", "/health", "200 when a request could be served now, else 503", None, Health),
    _Operation("get", "/version", "Version of the program", None, Version),
    _Operation("get", "/metrics", "Figures for Prometheus", None, "text/plain"),
    _Operation(
        "get", "/cluster/requests/{request_id}/explanation", "Why a request went where it went",
        None, ExplainedRequests,
    ),
    _Operation("get", "/cluster", "Workers, and requests by state", None, ClusterView),
    _Operation(
        "post", "/cluster/workers", "Start more workers here", StartWorkers, WorkersStarted
    ),
    _Operation("post", "/pd_role_switch", "Give a worker another role", SwitchRole, RoleSwitched),
    _Operation(
        "post", "/cluster/workers/{worker}/links", "Try and measure a worker's links to the others",
        TryLinksBody, LinksView,
    ),
    _Operation(
        "delete", "/cluster/workers/{worker}", "Let a worker finish and leave", None, WorkerLeaves
    ),
    _Operation(
        "get", "/kv/residency", "Where the KV blocks are, in which codec, how warm",
        None, KVResidencyView, query=PARAMETERS,
    ),
)  # fmt: skip

_PATH_PARAMETERS = {
    "model": "Name of the model",
    "worker": "Id of the worker",
    "request_id": "The X-Request-Id or the id of one of the latest responses",
}
_HEADERS = {
    "X-Request-Id": "Your own id of the request; it comes back, and the response's id contains it.",
    "x-penstock-ledger": "`1` adds `penstock_ledger`: what the time to first token went into.",
    "x-slo-ttft-ms": "Refuse the request if its first token would take longer, in ms (429).",
    "x-slo-tpot-ms": "Longest time per token after the first, in ms: no fuller worker takes it.",
    "x-penstock-retention-ttl": "What `retention_ttl` says, where the body does not.",
    "x-penstock-kv-pin": "What `kv_pin` says, where the body does not.",
    "x-llm-d-inference-fairness-id": "Tenant, where API keys do not tell: they wait in turns.",
}


def describe_api(version: str) -> dict[str, Any]:
    """Return the OpenAPI document."""
    described = [ErrorBody, *_described_types()]
    schemas, components = msgspec.json.schema_components(
        described, ref_template="#/components/schemas/{name}"
    )
    refs = dict(zip(described, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in _OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _describe(operation, refs)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Penstock", "version": version or "unknown"},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _described_types() -> Iterator[type]:
    for operation in _OPERATIONS:
        if operation.body is not None:
            yield operation.body
        if isinstance(operation.result, type):
            yield operation.result


def _describe(operation: _Operation, refs: dict[type, dict[str, Any]]) -> dict[str, Any]:
    result = operation.result
    content: dict[str, Any] = (
        {result: {}} if isinstance(result, str) else {"application/json": {"schema": refs[result]}}
    )
    if operation.is_stream:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    description: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {"200": {"description": operation.summary, "content": content}},
    }
    for name, words in _PATH_PARAMETERS.items():
        if f"{{{name}}}" in operation.path:
            description["parameters"] = [_parameter(name, "path", words, True)]
    if operation.query:
        asked = [_parameter(name, "query", words) for name, words in operation.query.items()]
        description["parameters"] = asked
    if operation.body is not None:
        schema = {"application/json": {"schema": refs[operation.body]}}
        description["requestBody"] = {"required": True, "content": schema}
        description["parameters"] = [_parameter(n, "header", w) for n, w in _HEADERS.items()]
        description["responses"] |= _errors(refs[ErrorBody])
    return description


def _parameter(name: str, place: str, words: str, is_required: bool = False) -> dict[str, Any]:
    return {
        "name": name,
        "in": place,
        "description": words,
        "required": is_required,
        "schema": {"type": "string"},
    }


def _errors(schema: dict[str, Any]) -> dict[str, Any]:
    codes: dict[int, list[str]] = {}
    for kind in ERROR_KINDS.values():
        codes.setdefault(kind.status, []).append(kind.code)
    content = {"application/json": {"schema": schema}}
    return {
        str(status): {"description": ", ".join(names), "content": content}
        for status, names in sorted(codes.items())
    }
