"""`LLM`: the Python API: a local cluster in the background, prompts in, texts out.

It composes the same `LocalCluster` that `penstock serve` runs, on an event loop in a thread of its
own, with the same tokenizer and stop-string code as the server. Called by whoever writes `from
penstock import LLM`.
"""

import asyncio
import secrets
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from penstock.background import Background
from penstock.cli.cluster import find_model
from penstock.core.config import EngineConfig
from penstock.core.errors import BadRequest, PeerLost, PromptTooLong, WorkersUnavailable
from penstock.core.messages import RequestFailed, TokenOutput
from penstock.core.request import Request, SamplingParams, Timeline
from penstock.core.service import ClusterStatus
from penstock.core.step import TokenLogprobs
from penstock.core.types import NS_PER_S, RequestId
from penstock.runtime.local import LocalCluster
from penstock.runtime.settings import ClusterSettings, ModelFacts
from penstock.server.chat_template import Message
from penstock.server.choice import Choice
from penstock.server.intake import Query, with_kv
from penstock.server.residency import KVResidencyView, make_query, view
from penstock.server.schema import RequestOptions, request_options
from penstock.server.settings import ServedModel, ServerSettings
from penstock.server.tokenizer import Tokenizer

MAX_LIVE_REQUESTS = 1024
"""Requests under way at once; the rest of a long list waits here rather than being refused."""
_SEEDS = 1 << 63

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """One prompt and what came of it.

    `token_ids` holds every token that was generated, one that ended the text included; `logprobs`
    has an entry for each of them if they were asked for. Times are in seconds; `ledger` says what
    the time to the first token went into.
    """

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    cached_tokens: int = 0
    ttft_s: float = 0.0
    latency_s: float = 0.0
    ledger: dict[str, float] = field(default_factory=dict)


class LLM:
    """A model on a local cluster, from construction to `close` (or the end of a `with` block).

    `engine_options` are those of `EngineConfig` (dtype, max_model_len, kv_cache_bytes, ...) and
    `cluster_options` those of `ClusterSettings`; without a model the built-in one is taken.

    Raises: `StartupFailed` saying what to change.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        prefill: int = 1,
        decode: int = 1,
        mixed: int = 0,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        cluster_options: dict[str, Any] | None = None,
        **engine_options: Any,  # noqa: ANN401  checked by EngineConfig
    ) -> None:
        settings = ClusterSettings(
            engine=EngineConfig(model=find_model(model), **engine_options),
            prefill=prefill,
            decode=decode,
            mixed=mixed,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            **(cluster_options or {}),
        )
        self._background = Background(settings)
        self._background.start()
        self._allows = ServerSettings(
            accepts_loss=not settings.kv_quality.is_exact,
            accepts_window=settings.accepts_window(self._background.facts),
        )
        # Runs at `close`, when nobody holds the object any more, or when the program ends.
        self._finalizer = weakref.finalize(self, self._background.stop)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._background.tokenizer

    @property
    def model(self) -> ModelFacts:
        """What is known of the loaded model."""
        return self._background.facts

    def status(self) -> ClusterStatus:
        """Return the cluster as of now."""
        return self._background.call(_status(self._background.cluster))

    def kv_residency(
        self, *, limit: int = 0, prefix: str = "", after: str | None = None
    ) -> KVResidencyView:
        """Say where KV blocks are: totals, and up to `limit` single blocks, those whose name begins
        with the hexadecimal digits `prefix`, from the `next` of an earlier answer on.

        Raises: `BadRequest` for what is none of these.
        """
        query = make_query(limit=limit, prefix=prefix, after=after)
        return view(self._background.call(self._background.cluster.survey(query)))

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
        **options: Any,  # noqa: ANN401  checked by RequestOptions
    ) -> list[RequestOutput]:
        """Continue each prompt, a text or its token ids; outputs are in the order of the prompts.

        A prompt whose `max_tokens` do not fit the context window gets as many as fit. `options`
        are as in a body: `priority` (lower goes first), `cache_salt` (prefixes are shared among
        those of one), and of their KV `kv_quality="exact"`, `kv_window` or `kv_select` tokens (both
        take a `kv_quality` in `cluster_options` that allows a loss), `retention_ttl` seconds and
        `kv_pin`, its name.

        Raises: `BadRequest` or a subclass for a prompt that cannot be served, then for none.
        """
        tokenizer = self.tokenizer
        asked: list[tuple[str | None, Sequence[int]]] = [
            (prompt, tokenizer.encode(prompt)) if isinstance(prompt, str) else (None, prompt)
            for prompt in ([prompts] if isinstance(prompts, str) else prompts)
        ]
        return self._run(asked, params, progress, options)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
        **options: Any,  # noqa: ANN401  checked by RequestOptions
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several; `options` as for `generate`.

        Raises: `BadRequest` or a subclass, as `generate`.
        """
        is_one = bool(messages) and isinstance(messages[0], dict)
        conversations: Any = [messages] if is_one else messages
        texts = [self.tokenizer.apply_chat_template(each) for each in conversations]
        asked = [(text, self.tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        return self._run(asked, params, progress, options)

    def close(self) -> None:
        """End the cluster and all its processes; closing twice is fine."""
        self._finalizer()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _run(
        self,
        asked: Sequence[tuple[str | None, Sequence[int]]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        progress: bool,
        asked_by_name: Mapping[str, object],
    ) -> list[RequestOutput]:
        if not self._finalizer.alive:
            raise WorkersUnavailable("this LLM is closed")
        each, options = _params_for(asked, params), request_options(asked_by_name)
        requests = [
            with_kv(self._request(token_ids, one, options), options, self._allows)
            for (_, token_ids), one in zip(asked, each, strict=True)
        ]
        jobs = [
            _Job(text, request, self._background.served)
            for (text, _), request in zip(asked, requests, strict=True)
        ]
        with _counting(len(jobs), progress) as advance:
            return self._background.call(_serve_all(self._background.cluster, jobs, advance))

    def _request(
        self, token_ids: Sequence[int], params: SamplingParams, options: RequestOptions
    ) -> Request:
        facts = self.model
        room = facts.max_model_len - len(token_ids)
        if not token_ids:
            raise BadRequest("a prompt is empty", "prompts")
        if not 0 <= min(token_ids) <= max(token_ids) < facts.vocab_size:
            raise BadRequest(f"token ids are from 0 to {facts.vocab_size - 1}", "prompts")
        if room < 1:
            raise PromptTooLong(
                f"a prompt has {len(token_ids)} tokens, the context window is "
                f"{facts.max_model_len} tokens and needs room for at least one more",
                "prompts",
            )
        seed = secrets.randbits(63) if params.seed is None else params.seed % _SEEDS
        return Request(
            request_id=RequestId(f"llm-{secrets.token_hex(8)}"),
            prompt_token_ids=tuple(token_ids),
            params=replace(params, seed=seed, max_tokens=min(params.max_tokens, room)),
            cache_salt=options.cache_salt or "",
            priority=options.priority or 0,
        )


def _params_for(
    asked: Sequence[object], params: SamplingParams | Sequence[SamplingParams] | None
) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(asked)
    if len(params) != len(asked):
        raise BadRequest(f"{len(params)} sampling params for {len(asked)} prompts", "params")
    return params


# ------------------------------------------------------------------------------- one prompt's way


class _Job:
    """One request and what has come of it. Lives on the loop's thread once submitted."""

    def __init__(self, prompt: str | None, request: Request, model: ServedModel) -> None:
        self.request = request
        self._prompt = prompt
        self._choice = Choice(0, _as_query(request), model)
        self._pieces: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []

    async def serve(self, cluster: LocalCluster) -> RequestOutput:
        """Submit the request and wait for its end; cancel it when nobody waits any more."""
        started_ns = time.monotonic_ns()
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        cluster.submit(replace(self.request, arrived_ns=started_ns), self._take)
        try:
            await self._done
        finally:
            # Also after a stop string: the worker does not know that it was one.
            cluster.cancel(self.request.request_id)
        return self._output(started_ns, time.monotonic_ns())

    def _take(self, event: TokenOutput | RequestFailed) -> None:
        if self._done.done():
            return
        if isinstance(event, RequestFailed):
            kind = WorkersUnavailable if event.is_retryable else PeerLost
            self._done.set_exception(kind(event.reason))
            return
        choice = self._choice
        if not choice.first_ns:
            choice.first_ns = time.monotonic_ns()
        self._token_ids += event.token_ids
        self._logprobs += event.logprobs
        self._pieces.append(choice.take(event))
        if choice.has_ended:
            self._done.set_result(None)

    def _output(self, started_ns: int, ended_ns: int) -> RequestOutput:
        choice = self._choice
        timeline = choice.timeline or Timeline()
        return RequestOutput(
            prompt=self._prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            text="".join(self._pieces),
            token_ids=tuple(self._token_ids),
            finish_reason=choice.finish_reason or "",
            logprobs=tuple(self._logprobs),
            cached_tokens=timeline.cached_tokens,
            ttft_s=(choice.first_ns - started_ns) / NS_PER_S,
            latency_s=(ended_ns - started_ns) / NS_PER_S,
            ledger=timeline.ledger(choice.first_ns),
        )


def _as_query(request: Request) -> Query:
    return Query(
        query_id=request.request_id,
        model="",
        requests=(request,),
        prompts=1,
        echoes=("",),
        is_stream=False,
        has_usage=False,
        has_running_usage=False,
        skip_special_tokens=True,
        includes_stop=False,
        wants_ledger=False,
    )


async def _status(cluster: LocalCluster) -> ClusterStatus:
    return cluster.status()


async def _serve_all(
    cluster: LocalCluster, jobs: Sequence[_Job], advance: Callable[[], None]
) -> list[RequestOutput]:
    """Serve all jobs, a limited number at a time; the first failure cancels the others."""
    places = asyncio.Semaphore(MAX_LIVE_REQUESTS)

    async def serve(job: _Job) -> RequestOutput:
        async with places:
            output = await job.serve(cluster)
        advance()
        return output

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(serve(job)) for job in jobs]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


# ----------------------------------------------------------------------------------- the terminal


@contextmanager
def _counting(total: int, is_wanted: bool) -> Iterator[Callable[[], None]]:
    """Give a function to be called for each finished prompt; it moves a bar on a terminal."""
    if not (is_wanted and sys.stderr.isatty()):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = ("prompts", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
