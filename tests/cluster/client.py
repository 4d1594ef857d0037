"""What tests ask of a running cluster: tokens of a request, and that nothing is left behind."""

import asyncio
import itertools
from collections.abc import Sequence

from penstock.core.errors import PeerLost
from penstock.core.messages import RequestFailed, TokenOutput
from penstock.core.request import Request, SamplingParams, Timeline
from penstock.core.service import WorkerStatus
from penstock.core.types import FinishReason, RequestId
from penstock.runtime.local import LocalCluster

_numbers = itertools.count()


class Stream:
    """One request and what has come of it so far."""

    def __init__(
        self,
        cluster: LocalCluster,
        prompt: Sequence[int],
        params: SamplingParams,
        salt: str = "",
        *,
        accepts_loss: bool = False,
        kv_select: int = 0,
    ) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: FinishReason | None = None
        self.timeline: Timeline | None = None
        self.request = Request(
            request_id=RequestId(f"r{next(_numbers)}"),
            prompt_token_ids=tuple(prompt),
            params=params,
            cache_salt=salt,
            accepts_loss=accepts_loss,
            kv_select=kv_select,
        )
        self._cluster = cluster
        self._news = asyncio.Event()
        self._failure: str | None = None
        cluster.submit(self.request, self._take)

    def _take(self, event: TokenOutput | RequestFailed) -> None:
        assert self.finish_reason is None, "a sink is called after the end"
        if isinstance(event, RequestFailed):
            self._failure = event.reason
        else:
            self.token_ids += event.token_ids
            self.logprobs += [entry.logprob for entry in event.logprobs]
            self.finish_reason = event.finish_reason
            self.timeline = self.timeline or event.timeline
        self._news.set()

    async def until(self, num_tokens: int) -> None:
        """Wait for that many tokens, or the end."""
        async with asyncio.timeout(60):
            while len(self.token_ids) < num_tokens and self.finish_reason is None:
                if self._failure is not None:
                    raise PeerLost(self._failure)
                self._news.clear()
                await self._news.wait()

    async def tokens(self) -> list[int]:
        """Wait for the end; return all tokens."""
        await self.until(1 << 60)
        return self.token_ids

    def cancel(self) -> None:
        self._cluster.cancel(self.request.request_id)


async def generate(
    cluster: LocalCluster, prompt: Sequence[int], params: SamplingParams
) -> list[int]:
    """Return the tokens of one request."""
    return await Stream(cluster, prompt, params).tokens()


async def balanced(cluster: LocalCluster, timeout_s: float = 10) -> None:
    """Wait until nobody knows of a request, and every block is free or cached on every worker."""
    async with asyncio.timeout(timeout_s):
        while not all(map(_is_balanced, cluster.status().workers)):
            await asyncio.sleep(0.01)
    cluster.controller.check()
    status = cluster.status()
    live = status.queued, status.prefilling, status.handing_off, status.decoding
    assert live == (0, 0, 0, 0), status
    assert cluster.num_live_requests == 0


def _is_balanced(worker: WorkerStatus) -> bool:
    load = worker.load
    if load is None:
        return worker.assigned == 0  # it has never had anything to report
    total = tuple(map(sum, zip(load.free_blocks, load.cached_blocks, strict=True)))
    is_idle = load.waiting == load.running == load.handing_off == 0
    return is_idle and total == worker.info.num_blocks and worker.assigned == 0
