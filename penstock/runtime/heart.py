"""`Heart`: how a member of a cluster, a worker or another host, keeps in touch with the controller.

It says at an interval that it is alive, and hears the same. A member on another host measures in
passing how far apart the two clocks are; and when the controller falls silent it lets go of
whatever the controller had it do, and looks for it, until one answers at the same address: that
one, or another that was started in its place.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from penstock.core.errors import WorkersUnavailable
from penstock.core.membership import Ping
from penstock.core.messages import Message
from penstock.core.types import CONTROLLER
from penstock.runtime.clock import HostTime
from penstock.runtime.messaging import Messenger
from penstock.runtime.settings import PulseSettings

SEEK_PAUSES_S: Final = (0.5, 3.0)
"""Between two attempts to find the controller again: at first, and at most."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Return:
    """What a member on another host does about a silent controller: `let_go` of all that it was
    told, then introduce itself with `hello` until it is heard.
    """

    let_go: Callable[[], None]
    hello: Callable[[], Message]


class Heart:
    """Lives on the running loop. `step_age_ns` says how long the step under way has taken.

    `time` is the cluster's time to keep, None on the controller's machine, whose clock it is.
    """

    def __init__(
        self,
        messenger: Messenger,
        pulse: PulseSettings,
        *,
        step_age_ns: Callable[[], int] = lambda: 0,
        time: HostTime | None = None,
        returning: Return | None = None,
    ) -> None:
        self._messenger = messenger
        self._pulse = pulse
        self._step_age_ns = step_age_ns
        self._time = time
        self._returning = returning
        self._loop = asyncio.get_running_loop()
        self._heard_s = self._loop.time()
        self._echo: tuple[int, int] | None = None
        self._is_new_controller = False
        self._word = asyncio.Event()

    def hear(self, ping: Ping) -> None:
        """Take a word of the controller in."""
        now_ns = time.monotonic_ns()
        self._heard_s = self._loop.time()
        self._echo = ping.sent_ns, now_ns
        self._word.set()
        if self._time is None or not ping.echo_ns:
            return
        round_trip_ns = now_ns - ping.echo_ns - ping.held_ns
        offset_ns = ping.sent_ns + round_trip_ns // 2 - now_ns
        if self._is_new_controller:
            self._is_new_controller = False
            self._time.jump(offset_ns)
        self._time.measure(round_trip_ns, offset_ns)

    async def beat(self) -> None:
        """Speak and listen for as long as this member lives.

        Raises: `WorkersUnavailable` when the controller was not found again in time.
        """
        while True:
            self._say()
            slept_s = self._loop.time()
            await asyncio.sleep(self._pulse.interval_s)
            now_s = self._loop.time()
            if now_s - slept_s > self._pulse.suspect_after_s:
                self._heard_s = now_s  # it is we who stood still
            silence_s = now_s - self._heard_s
            if self._returning is not None and silence_s >= self._pulse.lost_after_s:
                await self._seek(self._returning)

    def _say(self) -> None:
        now_ns = time.monotonic_ns()
        echo_ns, heard_ns = self._echo or (0, now_ns)
        ping = Ping(
            sender=self._messenger.name,
            epoch=self._messenger.epoch,
            sent_ns=now_ns,
            echo_ns=echo_ns,
            held_ns=now_ns - heard_ns,
            step_age_ns=self._step_age_ns(),
        )
        self._messenger.send(CONTROLLER, ping)

    async def _seek(self, returning: Return) -> None:
        pulse = self._pulse
        began_s = self._loop.time()
        silence_s = began_s - self._heard_s
        _log.warning("the controller has been silent for %.1f s: looking for it", silence_s)
        returning.let_go()
        self._echo = None
        self._word.clear()
        pause_s, longest_s = SEEK_PAUSES_S
        while not self._word.is_set():
            if self._loop.time() - began_s > pulse.rejoin_timeout_s:
                raise WorkersUnavailable(
                    f"the controller was not found again within {pulse.rejoin_timeout_s:.0f} s "
                    "(--rejoin-timeout)"
                )
            self._messenger.renew(CONTROLLER)
            self._messenger.send(CONTROLLER, returning.hello())
            with suppress(TimeoutError):
                await asyncio.wait_for(self._word.wait(), min(pause_s, pulse.rejoin_timeout_s))
            pause_s = min(longest_s, pause_s * 1.5)
        self._is_new_controller = True
        _log.warning("the controller is back after %.1f s", self._loop.time() - began_s)
