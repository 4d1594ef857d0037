"""The ASGI application: which path does what, and in which order the steps of a request are taken.

Owns the routes. What a body means is `intake.py`'s, what happens to it `generation.py`'s, how it is
answered `openai.py`'s, who may ask `gate.py`'s. The command line calls `create_app` and runs the
result with uvicorn as `uvicorn_config` says.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import cached_property
from importlib.resources import files
from time import time
from typing import TypeVar

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.core.errors import BadRequest, CapacityExceeded, PenstockError
from penstock.core.service import Administration, KVDirectory, LinkTester, Service
from penstock.server.asgi import JSON, read_body, respond
from penstock.server.cluster import ClusterApi
from penstock.server.errors import error_body, error_headers, error_kind, http_error_body
from penstock.server.explanations import ExplanationApi
from penstock.server.gate import CALLER, Gate, id_header
from penstock.server.generation import Generation
from penstock.server.intake import Intake, Query
from penstock.server.links import LinksApi
from penstock.server.metrics import Metrics
from penstock.server.openai import CHAT, TEXT, ChunkWriter, Form, token_text
from penstock.server.openapi import describe_api
from penstock.server.residency import ResidencyApi
from penstock.server.results import (
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
    decode_body,
)
from penstock.server.settings import ServedModel, ServerSettings
from penstock.server.stream import EventStream
from penstock.server.whole import respond_whole

Endpoint = Callable[[Scope, Receive, Send], Awaitable[None]]
T = TypeVar("T")

# Longer than common clients and load balancers keep an idle connection, so that they close first: a
# request sent while the server closes would fail for no reason that the client can see.
_KEEP_ALIVE_S = 75
_BACKLOG = 4096


def create_app(
    service: Service,
    model: ServedModel,
    settings: ServerSettings,
    administration: Administration | None = None,
    directory: KVDirectory | None = None,
    tester: LinkTester | None = None,
) -> Starlette:
    """Return the application that serves `model` from `service`."""
    api = Api(service, model, settings)
    cluster = ClusterApi(service, administration)
    residency = ResidencyApi(directory, api.explanations.ids_of)
    links = LinksApi(tester)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        api.intake.close()

    return Starlette(
        routes=[
            Route("/v1/chat/completions", _Raw(api.chat), methods=["POST"]),
            Route("/v1/completions", _Raw(api.complete), methods=["POST"]),
            Route("/v1/models", api.list_models),
            Route("/v1/models/{model:path}", api.show_model),
            Route("/tokenize", _Raw(api.tokenize), methods=["POST"]),
            Route("/detokenize", _Raw(api.detokenize), methods=["POST"]),
            Route("/health", api.show_health),
            Route("/version", api.show_version),
            Route("/metrics", api.show_metrics),
            Route("/cluster", cluster.show),
            Route("/cluster/workers", cluster.start_workers, methods=["POST"]),
            Route("/pd_role_switch", cluster.switch_role, methods=["POST"]),
            Route("/cluster/workers/{worker}", cluster.retire_worker, methods=["DELETE"]),
            Route("/cluster/workers/{worker}/links", links.try_links, methods=["POST"]),
            Route("/cluster/requests/{request_id:path}/explanation", api.explanations.show),
            Route("/kv/residency", residency.show),
            Route("/openapi.json", api.show_openapi),
            Route("/docs", api.show_docs),
        ],
        middleware=[Middleware(Gate, api_keys=settings.api_keys)],
        exception_handlers={
            PenstockError: api.on_error,
            HTTPException: api.on_http_error,
            Exception: api.on_bug,
        },
        lifespan=lifespan,
    )


def uvicorn_config(app: ASGIApp, *, host: str, port: int) -> uvicorn.Config:
    """Return how to run the application: one process, on the loop that the caller runs.

    Logging is left as the caller has set it up; requests are logged by `request_log.py`.
    """
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        loop="none",
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        backlog=_BACKLOG,
    )


class _Raw:
    """An endpoint that speaks ASGI itself: Starlette would call a method with a request."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._endpoint(scope, receive, send)


class Api:
    """The endpoints of one application."""

    def __init__(self, service: Service, model: ServedModel, settings: ServerSettings) -> None:
        self.service, self.model, self.settings = service, model, settings
        self.intake = Intake(model, settings)
        self.metrics = Metrics(model.names[0], service.status, service.accuracy)
        self.explanations = ExplanationApi(service)
        self._num_active = 0
        self._chat_bodies = msgspec.json.Decoder(ChatCompletionRequest)
        self._text_bodies = msgspec.json.Decoder(CompletionRequest)
        self._tokenize_bodies = msgspec.json.Decoder(TokenizeRequest)
        self._detokenize_bodies = msgspec.json.Decoder(DetokenizeRequest)

    # ---------------------------------------------------------------------------------- generating

    async def chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Continue a conversation."""
        with self._place():
            body = await self._read(scope, receive, self._chat_bodies)
            query = await self.intake.chat(body, scope[CALLER])
            await self._generate(query, CHAT, scope, receive, send)

    async def complete(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Continue texts."""
        with self._place():
            body = await self._read(scope, receive, self._text_bodies)
            query = await self.intake.completion(body, scope[CALLER])
            await self._generate(query, TEXT, scope, receive, send)

    @contextmanager
    def _place(self) -> Iterator[None]:
        """Take one of the places for requests, or refuse before anything is read."""
        if self._num_active >= self.settings.max_requests:
            raise CapacityExceeded(f"{self._num_active} requests are being served, the most", 1.0)
        self._num_active += 1
        try:
            yield
        finally:
            self._num_active -= 1

    async def _generate(
        self, query: Query, form: Form, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self.explanations.note(scope[CALLER], query)
        generation = Generation(self.service, query, self.model, self.metrics)
        created, headers = int(time()), id_header(scope[CALLER])
        tokenizer = self.model.tokenizer
        try:
            if query.is_stream:
                writer = ChunkWriter(form.chunks, query, created, tokenizer)
                stream = EventStream(generation, writer, self.settings)
                await stream.run(receive, send, headers)
                if generation.failure is not None:
                    self.metrics.count_failure(generation.failure)
            else:
                await respond_whole(
                    generation,
                    lambda texts: form.whole(query, created, generation.choices, texts, tokenizer),
                    receive,
                    send,
                    headers,
                )
        finally:
            generation.close(self.settings.is_logging_requests)

    async def _read(self, scope: Scope, receive: Receive, decoder: msgspec.json.Decoder[T]) -> T:
        settings = self.settings
        body = await read_body(scope, receive, settings.max_body_bytes, settings.body_timeout_s)
        return decode_body(decoder, body)

    # ------------------------------------------------------------------------------------- tokens

    async def tokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Return the tokens of a text or of a conversation."""
        body = await self._read(scope, receive, self._tokenize_bodies)
        tokens = await self.intake.tokenize(body)
        strings = None
        if body.return_token_strs:
            strings = [token_text(self.model.tokenizer, token) for token in tokens]
        result = TokenizeResult(
            count=len(tokens),
            max_model_len=self.model.max_model_len,
            tokens=tokens,
            token_strs=strings,
        )
        await respond(send, 200, msgspec.json.encode(result), id_header(scope[CALLER]))

    async def detokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Return the text of tokens, special ones included."""
        body = await self._read(scope, receive, self._detokenize_bodies)
        self.intake.check_model(body.model)
        if max(body.tokens, default=0) >= self.model.vocab_size:
            raise BadRequest(f"{max(body.tokens)} is not a token id", "tokens")
        text = self.model.tokenizer.decode(body.tokens, skip_special_tokens=False)
        result = msgspec.json.encode(DetokenizeResult(text))
        await respond(send, 200, result, id_header(scope[CALLER]))

    # ------------------------------------------------------------------------------------- looking

    async def list_models(self, request: HttpRequest) -> Response:
        """Return every name of the model."""
        return _json(request, ModelList(data=[self._card(name) for name in self.model.names]))

    async def show_model(self, request: HttpRequest) -> Response:
        """Return one model."""
        return _json(request, self._card(self.intake.check_model(request.path_params["model"])))

    async def show_health(self, request: HttpRequest) -> Response:
        """Say whether a request that came now could be served."""
        status = self.service.status()
        if status.is_ready:
            return _json(request, Health("ready"))
        reason = "the server is shutting down" if status.is_draining else "no worker is up"
        return _json(request, Health("unavailable", reason), 503)

    async def show_version(self, request: HttpRequest) -> Response:
        """Return the version of the program."""
        return _json(request, Version(self.settings.version))

    async def show_metrics(self, request: HttpRequest) -> Response:
        """Return what a Prometheus scraper asks for."""
        text, content_type = self.metrics.exposition(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    async def show_openapi(self, request: HttpRequest) -> Response:
        """Return the description of this API."""
        return Response(self._openapi, media_type=JSON.decode())

    async def show_docs(self, request: HttpRequest) -> Response:
        """Return a page that shows the description; it loads nothing from elsewhere."""
        return Response(self._docs, media_type="text/html")

    @cached_property
    def _openapi(self) -> bytes:
        return msgspec.json.encode(describe_api(self.settings.version))

    @cached_property
    def _docs(self) -> str:
        return (files("penstock.server") / "docs.html").read_text(encoding="utf-8")

    def _card(self, name: str) -> ModelCard:
        model = self.model
        return ModelCard(
            id=name, created=model.created, root=model.names[0], max_model_len=model.max_model_len
        )

    # -------------------------------------------------------------------------------------- errors

    async def on_error(self, request: HttpRequest, error: Exception) -> Response:
        """Answer with the error that was raised on purpose."""
        assert isinstance(error, PenstockError), error
        self.metrics.count_failure(error)
        headers = error_headers(error) + id_header(request.scope[CALLER])
        return _respond_json(error_body(error), error_kind(error).status, headers)

    async def on_http_error(self, request: HttpRequest, error: Exception) -> Response:
        """Answer that there is no such path or method."""
        assert isinstance(error, HTTPException), error
        method, path = request.method, request.url.path
        message = f"{method} {path}: {error.detail}"
        headers = [(k.encode(), v.encode()) for k, v in (error.headers or {}).items()]
        body = http_error_body(error.status_code, message)
        return _respond_json(body, error.status_code, headers + id_header(request.scope[CALLER]))

    async def on_bug(self, request: HttpRequest, error: Exception) -> Response:
        """Answer what nobody foresaw; the server's log has the traceback."""
        return _respond_json(http_error_body(500, "internal error"), 500, [])


def _json(request: HttpRequest, content: msgspec.Struct, status: int = 200) -> Response:
    return _respond_json(msgspec.json.encode(content), status, id_header(request.scope[CALLER]))


def _respond_json(body: bytes, status: int, headers: list[tuple[bytes, bytes]]) -> Response:
    response = Response(body, status, media_type=JSON.decode())
    response.raw_headers.extend(headers)
    return response
