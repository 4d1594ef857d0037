"""`Background`: a local cluster on an event loop in a thread of its own, for callers without a
loop.

`llm.py` is the caller. Everything of the cluster happens on that thread, its processes included:
the host dies with the thread that started it.
"""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

from penstock.core.errors import PenstockError, StartupFailed
from penstock.runtime.local import LocalCluster
from penstock.runtime.settings import ClusterSettings, ModelFacts
from penstock.server.settings import ServedModel
from penstock.server.tokenizer import Tokenizer, load_tokenizer

STOP_TIMEOUT_S = 30.0
Result = TypeVar("Result")


class Background:
    """From `start` to `stop`. `cluster` may be used on the thread's loop only."""

    cluster: LocalCluster
    facts: ModelFacts
    tokenizer: Tokenizer
    served: ServedModel

    def __init__(self, settings: ClusterSettings) -> None:
        self._settings = settings
        self._is_up: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="penstock", daemon=True)

    def start(self) -> None:
        """Start everything and wait until it serves. Raises: `StartupFailed`."""
        self._thread.start()
        try:
            self._is_up.result()
        finally:
            if not self._is_up.done() or self._is_up.exception() is not None:
                self.stop()

    def stop(self) -> None:
        """End everything and wait for it, at most `STOP_TIMEOUT_S`."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join(STOP_TIMEOUT_S)

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run `work` on the loop and wait for its result; an interrupt cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def _run(self) -> None:
        try:
            asyncio.run(self._live())
        except PenstockError as error:
            self._is_up.set_exception(error)
        finally:
            if not self._is_up.done():
                self._is_up.set_exception(StartupFailed("the cluster's thread ended"))

    async def _live(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        self.cluster = LocalCluster.launch(self._settings)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.cluster.stop)
            await self.cluster.start()
            self.facts = await self.cluster.ready()
            self.tokenizer = load_tokenizer(Path(self.facts.folder))
            self.served = ServedModel(
                names=(self._settings.engine.model,),
                tokenizer=self.tokenizer,
                max_model_len=self.facts.max_model_len,
                vocab_size=self.facts.vocab_size,
                eos_token_ids=self.facts.eos_token_ids,
            )
            self._is_up.set_result(None)
            await self._end.wait()
