"""What the supervisor does about workers that end, told by a host process that is only played."""

import asyncio
from collections.abc import Callable

from penstock.core.config import EngineConfig
from penstock.core.types import Role, WorkerId
from penstock.runtime.link import Exited, Fork, Forked, Prepare, Ready, ToFront, ToHost
from penstock.runtime.settings import ClusterSettings
from penstock.runtime.supervisor import Callbacks, Supervisor
from tests.runtime.odd_host import FACTS

D1 = WorkerId("decode-1")


class PlayedHost:
    """The front's end of a host process: it hears what it is told, and says what a test wants."""

    def __init__(self) -> None:
        self.last_lines: list[str] = []
        self.heard: list[ToHost] = []

    def watch(self, on_message: Callable[[ToFront], None], *_others: object) -> None:
        self.say = on_message

    def send(self, message: ToHost) -> None:
        self.heard.append(message)
        if isinstance(message, Fork):
            self.say(Forked(message.spec.worker_id, message.spec.epoch, 1))

    async def end(self, timeout_s: float) -> None:
        pass

    def epochs(self, name: WorkerId) -> list[int]:
        """Return the incarnations of a worker that were forked."""
        forks = [m.spec for m in self.heard if isinstance(m, Fork)]
        return [spec.epoch for spec in forks if spec.worker_id == name]


def test_a_worker_that_was_added_and_cannot_start_does_not_end_the_cluster(caplog) -> None:
    failures: list[object] = []

    async def story() -> None:
        host = PlayedHost()
        settings = ClusterSettings(engine=EngineConfig(model="m"))
        callbacks = Callbacks(
            progress=lambda stage, fraction: None,
            loaded=lambda model: None,
            lost=lambda *_: None,
            failed=failures.append,
        )
        supervisor = Supervisor(Prepare(settings, "", ""), host=host, callbacks=callbacks)
        supervisor.start()
        host.say(Ready(FACTS))
        for name in settings.workers():
            supervisor.joined(name, 1)
        assert supervisor.is_complete
        assert supervisor.add(Role.DECODE) == D1
        host.say(Exited(D1, 1, "exit code 1", ("no room for its KV cache",)))
        assert failures == []
        assert D1 not in supervisor.slots
        assert supervisor.is_complete
        assert supervisor.add(Role.DECODE) == D1  # and it may be tried again
        assert host.epochs(D1) == [1, 2]
        supervisor.joined(D1, 2)
        host.say(Exited(D1, 2, "signal 9", ()))  # which, once up, is replaced like any other
        await asyncio.sleep(0.01)
        assert host.epochs(D1) == [1, 2, 3]
        await supervisor.stop(0.0)

    asyncio.run(story())
    assert "decode-1 ended while starting: exit code 1\nno room for its KV cache" in caplog.text
