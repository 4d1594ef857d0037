"""A `Service` for tests of the HTTP side: deterministic tokens, made on the event loop.

Owns no model and no cluster; it shows what the HTTP side asked for and lets a test decide what
comes back. One loop turn makes one token of each request, as a step would.
"""

import asyncio
from collections.abc import Callable
from time import monotonic_ns

import httpx
from starlette.applications import Starlette
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from penstock.core.block import KVGroup, KVLayout
from penstock.core.descriptors import WorkerInfo
from penstock.core.errors import PenstockError
from penstock.core.explain import Accuracy, Candidate, Explanation, Parts
from penstock.core.messages import Load, RequestFailed, TokenOutput
from penstock.core.request import Request, Timeline
from penstock.core.service import ClusterStatus, Sink, WorkerStatus
from penstock.core.step import TokenLogprobs
from penstock.core.types import FinishReason, RequestId, Role, WorkerId
from penstock.server.app import create_app
from penstock.server.chat_template import ChatTemplate
from penstock.server.settings import ServedModel, ServerSettings
from penstock.server.tokenizer import Tokenizer

BYTE_TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
EOS = 256
PIPE = 257
VOCAB_SIZE = 300


def byte_tokenizer() -> Tokenizer:
    """Make a tokenizer whose token b is the byte b; 256 is the special end of text, 257 is `||`."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    characters = {byte: chr(byte) for byte in shown}
    characters |= {byte: chr(256 + index) for index, byte in enumerate(hidden)}
    backend = Backend(models.BPE({characters[b]: b for b in range(256)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    backend.add_tokens(["||"])
    return Tokenizer(backend, ChatTemplate(BYTE_TEMPLATE, {}))


def byte_model(**changes) -> ServedModel:
    """Make a served model over the byte tokenizer."""
    fields = {
        "names": ("tiny", "alias"),
        "tokenizer": byte_tokenizer(),
        "max_model_len": 256,
        "vocab_size": VOCAB_SIZE,
        "eos_token_ids": (EOS,),
        "created": 1700000000,
    }
    return ServedModel(**(fields | changes))


class ScriptedService:
    """Answers each request with `script(request)`, a list of token ids, cut at `max_tokens`.

    `chunks` is how many tokens come at once. A script that runs out ends the request with `stop`,
    or begins anew for ever if it `is_endless`.
    """

    def __init__(
        self,
        script: Callable[[Request], list[int]],
        *,
        chunks: int = 1,
        is_endless: bool = False,
    ) -> None:
        self.script = script
        self.chunks = chunks
        self.is_endless = is_endless
        self.submitted: list[Request] = []
        self.cancelled: list[RequestId] = []
        self.made: dict[RequestId, int] = {}
        self.refusal: PenstockError | None = None
        self.failure_after: int | None = None
        self.is_draining = False
        self.load: Load | None = None
        self._live: dict[RequestId, tuple[Request, Sink, list[int]]] = {}

    @property
    def num_live(self) -> int:
        return len(self._live)

    def submit(self, request: Request, sink: Sink) -> None:
        if self.refusal is not None:
            raise self.refusal
        assert request.request_id not in self._live
        self.submitted.append(request)
        tokens = self.script(request)
        self._live[request.request_id] = (request, sink, tokens)
        self.made[request.request_id] = 0
        asyncio.get_running_loop().call_soon(self._step, request.request_id)

    def cancel(self, request_id: RequestId) -> None:
        if self._live.pop(request_id, None) is not None:
            self.cancelled.append(request_id)

    def status(self) -> ClusterStatus:
        workers = (WorkerStatus(info=worker_info(), assigned=len(self._live), load=self.load),)
        return ClusterStatus(
            workers=() if self.is_draining else workers,
            queued=0,
            prefilling=0,
            handing_off=0,
            decoding=len(self._live),
            arrived=len(self.submitted),
            finished=0,
            aborted=0,
            failed=0,
            retried=0,
            is_draining=self.is_draining,
        )

    def explain(self, request_id: RequestId) -> Explanation | None:
        if request_id not in self.made:
            return None
        return explanation_of(request_id)

    def accuracy(self) -> Accuracy:
        return Accuracy(ttft_count=2, ttft_predicted_s=3.0, ttft_actual_s=4.0)

    def _step(self, request_id: RequestId) -> None:
        if request_id not in self._live:
            return
        request, sink, tokens = self._live[request_id]
        done = self.made[request_id]
        if self.failure_after is not None and done >= self.failure_after:
            del self._live[request_id]
            sink(RequestFailed(request_id=request_id, reason="the worker is gone"))
            return
        if self.is_endless:
            tokens, done = tokens * self.chunks, 0
        ids = tuple(tokens[: request.params.max_tokens][done : done + self.chunks])
        done = self.made[request_id] = done + len(ids)
        reason = self._reason(request, tokens, done)
        if reason is not None:
            del self._live[request_id]
        else:
            asyncio.get_running_loop().call_soon(self._step, request_id)
        wants = request.params.logprobs
        sink(
            TokenOutput(
                request_id=request_id,
                token_ids=ids,
                logprobs=tuple(logprobs_of(i, wants) for i in ids) if wants is not None else (),
                finish_reason=reason,
                timeline=timeline_of(request) if done == len(ids) else None,
            )
        )

    def _reason(self, request: Request, tokens: list[int], done: int) -> FinishReason | None:
        if self.is_endless:
            return None
        if done >= len(tokens):
            return FinishReason.STOP
        return FinishReason.LENGTH if done >= request.params.max_tokens else None


def logprobs_of(token_id: int, alternatives: int) -> TokenLogprobs:
    top = tuple(((token_id + i) % 250, -0.5 - i) for i in range(alternatives))
    return TokenLogprobs(-0.5, top)


def timeline_of(request: Request) -> Timeline:
    """A request that crossed from one worker to another, with a millisecond for each part."""
    now_ns = monotonic_ns()
    stamps = [request.arrived_ns + (now_ns - request.arrived_ns) * i // 6 for i in range(1, 7)]
    return Timeline(
        arrived_ns=request.arrived_ns,
        prefill_started_ns=stamps[0],
        offered_ns=stamps[1],
        offer_received_ns=stamps[2],
        reserved_ns=stamps[3],
        pulled_ns=stamps[4],
        first_token_ns=stamps[5],
        prefill_worker="prefill-0",
        decode_worker="decode-0",
        transport="shm",
        pull_bytes=4096,
        pull_spans=2,
        pull_moves=1,
        pull_copy_ns=200_000,
        prompt_tokens=len(request.prompt_token_ids),
        cached_tokens=3,
    )


def explanation_of(request_id: RequestId) -> Explanation:
    """A request that went from one worker to another, chosen against a third."""
    parts = Parts(
        queue_ms=1.0,
        prefill_ms=8.0,
        transfer_ms=0.5,
        first_decode_ms=0.5,
        ttft_ms=10.0,
        tpot_ms=1.0,
    )
    return Explanation(
        request_id=request_id,
        policy="predicted",
        attempt=1,
        num_tokens=40,
        expected_output_tokens=16,
        prefill_worker=WorkerId("prefill-0"),
        decode_worker=WorkerId("decode-0"),
        waited_ms=0.25,
        predicted=parts,
        candidates=(
            Candidate(
                worker_id=WorkerId("prefill-0"), part="prefill", cost_ms=9.0, cached_tokens=32
            ),
            Candidate(
                worker_id=WorkerId("prefill-1"), part="prefill", cost_ms=12.0, cached_tokens=0
            ),
            Candidate(worker_id=WorkerId("decode-0"), part="decode", cost_ms=1.5, cached_tokens=0),
            Candidate(
                worker_id=WorkerId("decode-0"),
                part="alone",
                cost_ms=None,
                cached_tokens=0,
                closed="full",
            ),
        ),
        actual=parts,
        outcome="finished",
    )


def worker_info() -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId("decode-0"),
        role=Role.DECODE,
        epoch=1,
        address="",
        pid=1,
        layout=KVLayout("tiny", (KVGroup((0,)),), 1, 8, 32, "float32"),
        num_blocks=(100,),
        max_model_len=256,
        max_num_seqs=8,
    )


def text_script(text: str) -> Callable[[Request], list[int]]:
    """Answer everything with the bytes of `text`, then the end of text."""
    return lambda request: [*text.encode(), EOS]


def make_app(service: ScriptedService, model: ServedModel | None = None, **settings) -> Starlette:
    return create_app(service, model or byte_model(), ServerSettings(version="1.2.3", **settings))


def client(app: Starlette) -> httpx.AsyncClient:
    """Return an HTTP client that calls the application in this process."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=True)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def call(
    method: str, path: str, service: ScriptedService | None = None, *, options=None, **kwargs
) -> httpx.Response:
    """Send one request to an application of its own, which answers `hello` unless told else."""

    async def story() -> httpx.Response:
        app = make_app(service or ScriptedService(text_script("hello")), **(options or {}))
        async with client(app) as http:
            return await http.request(method, path, **kwargs)

    return asyncio.run(story())
