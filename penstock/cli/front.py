"""`Front`: one server from its first moment to its last: the cluster, HTTP before it, signals, and
what the terminal shows.
"""

import asyncio
import gc
import os
import signal
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from penstock.cli.cluster import NO_MODEL_NAME, model_name
from penstock.cli.console import ServeConsole, set_up_logging
from penstock.cli.listener import Listener
from penstock.cli.loading import LoadingGate
from penstock.core.errors import StartupFailed
from penstock.core.version import VERSION
from penstock.runtime.local import LocalCluster
from penstock.runtime.settings import INSTANT_EXECUTOR, ModelFacts
from penstock.server.app import create_app, uvicorn_config
from penstock.server.settings import ServedModel, ServerSettings
from penstock.server.tokenizer import Tokenizer, load_tokenizer
from penstock.transport.key import key_location

_LAST_WORDS_S = 2.0
"""How long clients may take to read that their request was given up."""
_SHUTDOWN_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Front:
    """What runs in the front process. `started_s` is when the command began, for the record."""

    def __init__(
        self, cluster: LocalCluster, listener: Listener, options: Namespace, started_s: float
    ) -> None:
        self._cluster = cluster
        self._listener = listener
        self._options = options
        self._started_s = started_s
        self._console = ServeConsole(options.transport)
        self._num_signals = 0

    async def run(self) -> int:
        """Serve until told to stop; return the exit code.

        Raises: `StartupFailed` when the cluster cannot come up or stay up.
        """
        self._stop, self._hurry = asyncio.Event(), asyncio.Event()
        set_up_logging(is_logging_requests=self._options.log_requests)
        loop = asyncio.get_running_loop()
        for number in _SHUTDOWN_SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        self._gate = LoadingGate(self._describe_loading)
        self._server = self._make_server()
        async with AsyncExitStack() as stack:
            stack.callback(self._listener.close)
            stack.callback(self._console.end_progress)
            stack.push_async_callback(self._cluster.stop)
            await self._cluster.start()
            self._serving = asyncio.create_task(self._server.serve([self._listener.socket]))
            stack.push_async_callback(self._end_serving)
            if await self._come_up(stack):
                await self._until_told()
        return 0

    def _make_server(self) -> "_Server":
        config = uvicorn_config(self._gate, host=self._options.host, port=self._options.port)
        # What there is to open and to close is opened and closed here.
        config.lifespan = "off"
        return _Server(config)

    def _on_signal(self) -> None:
        self._num_signals += 1
        self._stop.set()
        if self._num_signals > 1:
            self._hurry.set()

    # ------------------------------------------------------------------------------------- loading

    def _describe_loading(self) -> str:
        stage, fraction = self._cluster.stage
        return f"the model is loading: {stage} ({fraction:.0%})"

    async def _come_up(self, stack: AsyncExitStack) -> bool:
        """Wait for the model, then put the real application in place; False when told to stop."""
        model = self._cluster.settings.engine.model
        self._console.begin(model_name(model))
        self._cluster.on_progress = self._console.advance
        tokenizer = asyncio.ensure_future(self._load_tokenizer(Path(model).expanduser()))
        stack.callback(tokenizer.cancel)
        ready = asyncio.ensure_future(self._cluster.ready())
        if not await self._first_of(ready):
            ready.cancel()
            return False
        facts = ready.result()
        served = self._served(facts, await tokenizer)
        settings, cluster = self._server_settings(facts), self._cluster
        app = create_app(cluster, served, settings, cluster, cluster, cluster)
        await stack.enter_async_context(app.router.lifespan_context(app))
        self._gate.app = app
        # What is here now stays: the collector need not look at it again between two tokens.
        gc.collect()
        gc.freeze()
        infos = {worker.info.worker_id: worker.info for worker in self._cluster.status().workers}
        self._console.show_cluster(
            self._listener.address,
            self._names()[0],
            facts,
            [infos[name] for name in self._cluster.settings.workers() if name in infos],
            time.monotonic() - self._started_s,
        )
        self._tell_how_to_join()
        if self._listener.is_open_to_others and not self._api_keys():
            self._console.say("anyone who can reach this address may use it: see --api-key")
        return True

    def _tell_how_to_join(self) -> None:
        network = self._cluster.settings.network
        if network is None:
            return
        key_file = Path(network.key_file) if network.key_file else None
        self._console.say(
            "workers of other hosts join with\n"
            f"  penstock worker --join {self._cluster.join_address} --role decode\n"
            f"and the cluster key: {key_location(key_file)}"
        )

    async def _load_tokenizer(self, folder: Path) -> Tokenizer:
        """Read a model's folder while the host reads the weights; what has to be fetched first is
        there when the host is done.
        """
        if not folder.is_dir():
            folder = Path((await self._cluster.ready()).folder)
        return await asyncio.to_thread(load_tokenizer, folder)

    async def _first_of(self, task: "asyncio.Future[ModelFacts]") -> bool:
        """Wait for `task` or the word to stop; True when it was the task."""
        stop = asyncio.ensure_future(self._stop.wait())
        ends: list[asyncio.Future[Any]] = [task, stop]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        return task.done()

    def _names(self) -> tuple[str, ...]:
        names = tuple(self._options.served_model_name or ())
        names = names or (model_name(self._cluster.settings.engine.model),)
        if self._cluster.settings.executor == INSTANT_EXECUTOR:
            return (NO_MODEL_NAME, *names)
        return names

    def _served(self, facts: ModelFacts, tokenizer: Tokenizer) -> ServedModel:
        return ServedModel(
            names=self._names(),
            tokenizer=tokenizer,
            max_model_len=facts.max_model_len,
            vocab_size=facts.vocab_size,
            eos_token_ids=facts.eos_token_ids,
            created=int(time.time()),
        )

    def _api_keys(self) -> tuple[str, ...]:
        keys = tuple(self._options.api_key or ())
        if not keys and (key := os.environ.get("PENSTOCK_API_KEY")):
            keys = (key,)
        return keys

    def _server_settings(self, facts: ModelFacts) -> ServerSettings:
        return ServerSettings(
            api_keys=self._api_keys(),
            version=VERSION,
            is_logging_requests=self._options.log_requests,
            accepts_loss=not self._options.kv_quality.is_exact,
            accepts_window=self._cluster.settings.accepts_window(facts),
        )

    # ------------------------------------------------------------------------- serving and its end

    async def _until_told(self) -> None:
        stop = asyncio.ensure_future(self._stop.wait())
        ends: list[asyncio.Future[Any]] = [stop, self._cluster.broken, self._serving]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if self._cluster.broken.done():
            raise self._cluster.broken.result()
        if self._serving.done():
            raise StartupFailed("the HTTP server ended by itself")

    async def _end_serving(self) -> None:
        """Let requests under way finish, as long as they may; then end them with an error."""
        self._cluster.drain()
        count = self._cluster.num_live_requests
        if count and self._num_signals:
            self._console.say(f"finishing {count} requests; Ctrl-C again ends at once")
        self._server.should_exit = True
        hurry = asyncio.ensure_future(self._hurry.wait())
        ends: list[asyncio.Future[Any]] = [self._serving, hurry]
        timeout_s = self._options.shutdown_timeout if self._num_signals else 0.0
        await asyncio.wait(ends, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        self._cluster.abandon("the server was stopped before this request was finished")
        await asyncio.wait([self._serving], timeout=_LAST_WORDS_S)
        self._server.force_exit = True
        await self._serving


class _Server(uvicorn.Server):
    """uvicorn without its own idea of signals: they are handled above."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
