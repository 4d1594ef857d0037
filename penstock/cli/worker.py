"""`penstock worker`: workers of this host in a cluster that is served from another one.

It asks to be let in before anything is loaded, so what is wrong with address, key or version is
known at once; it loads what the cluster serves, and then says little.
"""

import asyncio
import signal
import sys
from argparse import Namespace
from typing import Any

from msgspec.structs import replace

from penstock.cli.cluster import find_clusters_model, model_name, pulse_settings
from penstock.cli.console import ServeConsole, set_up_logging
from penstock.core.config import EngineConfig, Handoff
from penstock.core.errors import PenstockError, StartupFailed
from penstock.core.membership import Admitted
from penstock.core.types import Role, WorkerId
from penstock.runtime.folder import RunFolder
from penstock.runtime.joined import JoinedHost, JoinSettings
from penstock.runtime.settings import ClusterSettings, NetworkSettings, split_address

_SHUTDOWN_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def worker(options: Namespace) -> int:
    """Take part until a signal or a failure; return the exit code.

    Raises: `StartupFailed` when the cluster cannot be joined, or cannot be kept.
    """
    try:
        host, port = split_address(options.join, "--join")
        settings = JoinSettings(
            host=host,
            port=port,
            name=options.name or "",
            listen_host=options.host or "",
            advertised=options.advertise,
            key_file=options.cluster_key_file,
            pulse=pulse_settings(options),
        )
    except StartupFailed as error:
        print(f"penstock worker: error: {error}", file=sys.stderr)
        return 2

    import uvloop

    return uvloop.run(_Joining(settings, options).run())


class _Joining:
    """What runs in this process, from its first moment to its last."""

    def __init__(self, settings: JoinSettings, options: Namespace) -> None:
        self._settings = settings
        self._options = options
        self._console = ServeConsole()
        self._host = JoinedHost(settings, RunFolder.create())
        self._num_signals = 0
        self._is_told = False

    async def run(self) -> int:
        self._stop, self._hurry = asyncio.Event(), asyncio.Event()
        set_up_logging(is_logging_requests=False)
        loop = asyncio.get_running_loop()
        for number in _SHUTDOWN_SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        self._host.on_progress = self._console.advance
        self._host.on_worker = self._say_joined
        asking = asyncio.ensure_future(self._host.ask())
        try:
            if not await self._first_of(asking):
                return 130
            admitted = asking.result()
            self._host.start(self._cluster_settings(admitted))
            if await self._first_of(self._host.broken):
                raise _explained(self._host.broken.result())
            await self._leave()
            return 0
        finally:
            asking.cancel()
            self._console.end_progress()
            await self._host.stop()

    def _on_signal(self) -> None:
        self._num_signals += 1
        self._stop.set()
        if self._num_signals > 1:
            self._hurry.set()

    async def _first_of(self, end: "asyncio.Future[Any]") -> bool:
        """Wait for `end` or the word to stop; True when it was the former."""
        stop = asyncio.ensure_future(self._stop.wait())
        ends: list[asyncio.Future[Any]] = [end, stop]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        return end.done()

    def _cluster_settings(self, admitted: Admitted) -> ClusterSettings:
        """Return what to load and start here: the cluster's model with this host's means."""
        options = self._options
        engine = self._engine(admitted.engine)
        self._console.begin(model_name(engine.model))
        role = Role(options.role)
        return ClusterSettings(
            engine=engine,
            prefill=options.workers if role is Role.PREFILL else 0,
            decode=options.workers if role is Role.DECODE else 0,
            mixed=options.workers if role is Role.MIXED else 0,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            is_prefix_caching=not options.no_prefix_caching,
            handoff=Handoff(options.handoff),
            handoff_codec=options.handoff_codec,
            executor=admitted.executor,
            transport=options.transport,
            tcp_streams=options.tcp_streams,
            threads=options.threads,
            is_pinned=options.pin_cores,
            decision_log=options.decision_log,
            network=NetworkSettings(
                host=self._host.listen_host,
                advertised=options.advertise,
                key_file=options.cluster_key_file,
            ),
            pulse=self._settings.pulse,
            host=admitted.name,
            tiers=tuple(options.kv_tier),
            kv_quality=options.kv_quality,
            kv_eviction=options.kv_eviction,
        )

    def _engine(self, theirs: EngineConfig) -> EngineConfig:
        return replace(
            theirs,
            model=find_clusters_model(theirs.model, self._options.model),
            dtype=self._options.dtype or theirs.dtype,
            block_size=self._options.block_size or theirs.block_size,
            device=self._options.device,
            gpu_memory_utilization=self._options.gpu_memory_utilization,
            enforce_eager=self._options.enforce_eager,
            attention_backend=self._options.attention_backend,
            kv_cache_bytes=self._options.kv_cache_memory,
            # Whether code may run here that comes with a model is said here and nowhere else.
            trust_remote_code=self._options.trust_remote_code,
        )

    def _say_joined(self, worker_id: WorkerId) -> None:
        model = self._host.model
        engine = f": {model.description}" if model is not None else ""
        self._console.say(f"worker {worker_id} has joined {self._host.door}{engine}")
        if model is not None and not self._is_told:
            self._is_told = True
            for note in (*filter(None, [model.tiers]), *model.codec_notes):
                self._console.say(f"KV tiers: {note}")

    async def _leave(self) -> None:
        """Finish what the workers have, as long as that may take."""
        count = len(self._host.worker_ids)
        self._console.say(f"{count} workers finish what they have; Ctrl-C again leaves at once")
        leaving = asyncio.ensure_future(self._host.leave(self._options.shutdown_timeout))
        hurry = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait([leaving, hurry], return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        hurry.cancel()


def _explained(error: Exception) -> PenstockError:
    return error if isinstance(error, PenstockError) else StartupFailed(str(error))
