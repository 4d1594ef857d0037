"""`NameReports`: tells the controller which named blocks this worker has, for its prefix index.

Changes are collected where names are given and dropped (`kv/prefix_cache.py`) and sent in batches:
at most once per interval while the worker is busy, and when it becomes idle. A name that came and
went in between is sent once, as what it is now. What a tier below the pool has is there, too. A
controller that was started anew knows nothing and asks for all there is.
"""

from collections.abc import Callable, Iterable
from typing import Final

from penstock.core.config import WorkerConfig
from penstock.core.events import Command, Send
from penstock.core.messages import BlocksChanged
from penstock.core.types import CONTROLLER, BlockHash
from penstock.kv.cache import KVCache

NAMES_MAX: Final = 4096
"""In one message."""


class NameReports:
    """What has changed since the controller was last told."""

    def __init__(
        self,
        config: WorkerConfig,
        kv: KVCache,
        is_below: Callable[[BlockHash], bool] = lambda _: False,
    ) -> None:
        is_on = config.is_prefix_caching and config.names_interval_ns is not None
        self._config = config
        self._kv = kv
        self._is_below = is_below
        self._is_on = is_on
        self._changes: dict[BlockHash, bool] = kv.watch_names() if is_on else {}
        self._interval_ns = config.names_interval_ns or 0
        self._sent_ns = -self._interval_ns

    def begin_anew(self, below: Iterable[BlockHash] = ()) -> None:
        """Have everything there is told once more, next time: what the pool has, and `below`.

        O(names).
        """
        if self._is_on:
            self._changes = self._kv.watch_names()
            self._changes.update(dict.fromkeys(below, True))
            self._sent_ns = -self._interval_ns

    def due(self, now_ns: int, *, is_idle: bool) -> list[Command]:
        """Return the messages that are due, and forget what is in them. O(1) when none is."""
        if not self._changes or not (is_idle or now_ns - self._sent_ns >= self._interval_ns):
            return []
        self._sent_ns = now_ns
        is_below = self._is_below
        changes = [(name, is_there or is_below(name)) for name, is_there in self._changes.items()]
        self._changes.clear()
        return [
            self._message(changes[start : start + NAMES_MAX])
            for start in range(0, len(changes), NAMES_MAX)
        ]

    def _message(self, changes: list[tuple[BlockHash, bool]]) -> Command:
        message = BlocksChanged(
            worker_id=self._config.worker_id,
            epoch=self._config.epoch,
            stored=tuple(name for name, is_there in changes if is_there),
            removed=tuple(name for name, is_there in changes if not is_there),
        )
        return Send(CONTROLLER, message)
