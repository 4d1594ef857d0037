"""Who is let in, who is believed to be alive, and what is said to whom."""

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from msgspec.structs import replace

from penstock.core.config import EngineConfig
from penstock.core.descriptors import WorkerInfo
from penstock.core.events import Event, Retire, WorkerLost, WorkerSuspected
from penstock.core.membership import Admitted, Evict, Gone, Join, Leave, Ping, Refused
from penstock.core.messages import Hello, Message, PeerUp
from penstock.core.types import CONTROLLER, Role, WorkerId
from penstock.core.version import VERSION
from penstock.runtime.instant import instant_layout
from penstock.runtime.membership import Membership
from penstock.runtime.messaging import Messenger
from penstock.runtime.protocol import machine_id, protocol_digest
from penstock.runtime.settings import ClusterSettings, ModelFacts, PulseSettings

PULSE = PulseSettings(interval_s=0.02, suspect_after_s=0.2, lost_after_s=0.5, step_timeout_s=60.0)
FACTS = ModelFacts(
    folder="",
    layout=instant_layout(32),
    num_blocks=(8,),
    max_model_len=256,
    eos_token_ids=(0,),
    vocab_size=100,
    description="",
)
W = WorkerId("decode-there-0")


class Member:
    """Somebody on the other side: a host or a worker."""

    def __init__(self, name: str, epoch: int, folder: Path, controller: Messenger) -> None:
        self.heard: list[Message] = []
        self.messenger = Messenger(WorkerId(name), epoch, folder, self.heard.append)
        self.messenger.open()
        self.messenger.connect(CONTROLLER, 0, controller.address)

    def say(self, message: Message) -> None:
        self.messenger.send(CONTROLLER, message)

    def ping(self, step_age_ns: int = 0) -> None:
        name, epoch = self.messenger.name, self.messenger.epoch
        now_ns = time.monotonic_ns()
        self.say(Ping(sender=name, epoch=epoch, sent_ns=now_ns, step_age_ns=step_age_ns))

    def join(self, **changes: object) -> None:
        join = Join(
            host=self.messenger.name,
            address=self.messenger.address,
            name="There",
            version=VERSION,
            protocol=protocol_digest(),
            machine=machine_id(),
            sent_ns=1,
        )
        self.say(replace(join, **changes))

    def hello(self, num_returns: int = 0, host: str = "there") -> None:
        info = WorkerInfo(
            worker_id=self.messenger.name,
            role=Role.DECODE,
            epoch=self.messenger.epoch,
            address=self.messenger.address,
            pid=0,
            layout=instant_layout(32),
            num_blocks=(8,),
            max_model_len=256,
            max_num_seqs=8,
            host=host,
        )
        self.say(Hello(info=info, num_returns=num_returns))

    async def hears(self, kind: type[Message]) -> Message:
        while not (found := [m for m in self.heard if isinstance(m, kind)]):
            await asyncio.sleep(0.002)
        self.heard[:] = [message for message in self.heard if not isinstance(message, kind)]
        return found[-1]


class Front:
    """The controller's process, with a controller that writes down what it is told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events: list[Event] = []
        self.killed: list[tuple[WorkerId, int]] = []
        self._members: list[Member] = []
        self.messenger = Messenger(
            CONTROLLER,
            0,
            folder,
            self._receive,
            hears_strangers=True,
            on_fenced=lambda sender, epoch: self.membership.on_fenced(sender, epoch),
        )
        self.messenger.open()
        settings = ClusterSettings(engine=EngineConfig(model="m"), pulse=PULSE)
        self.membership = Membership(
            self.messenger,
            settings,
            deliver=self.events.append,
            kill=lambda worker_id, epoch: self.killed.append((worker_id, epoch)),
        )
        self.watching = asyncio.ensure_future(self.membership.watch())

    def _receive(self, message: Message) -> None:
        if isinstance(message, Hello):
            if self.membership.welcome(message):
                self.events.append(message)
        else:
            assert self.membership.receive(message), message

    def member(self, name: str, epoch: int = 1) -> Member:
        member = Member(name, epoch, self.folder, self.messenger)
        self._members.append(member)
        return member

    @property
    def news(self) -> list[Event]:
        """What is not said of a silence, which a slow machine may bring about."""
        return [event for event in self.events if not isinstance(event, WorkerSuspected)]

    async def is_told(self, kind: type[Event]) -> Event:
        while not (found := [event for event in self.events if isinstance(event, kind)]):
            await asyncio.sleep(0.002)
        self.events.clear()
        return found[-1]

    async def close(self) -> None:
        self.watching.cancel()
        await asyncio.wait([self.watching])
        for member in self._members:
            member.messenger.close()
        self.messenger.close()


def run(story: Callable[[Front], Awaitable[None]]) -> None:
    async def tell() -> None:
        with tempfile.TemporaryDirectory(prefix="pt-") as folder:
            front = Front(Path(folder))
            try:
                async with asyncio.timeout(20):
                    await story(front)
            finally:
                await front.close()

    asyncio.run(tell())


async def joined(front: Front) -> tuple[Member, Member]:
    """Return a host that was let in and its one worker."""
    front.membership.loaded(FACTS)
    host, worker = front.member("host-1"), front.member(W)
    host.join()
    await host.hears(Admitted)
    worker.hello()
    assert (await host.hears(PeerUp)).info.worker_id == W
    await front.is_told(Hello)
    return host, worker


def test_a_host_is_let_in_when_the_model_is_loaded_and_hears_a_word_before():
    async def story(front: Front) -> None:
        host = front.member("host-1")
        host.join()
        await host.hears(Ping)
        assert not any(isinstance(message, Admitted) for message in host.heard)
        front.membership.loaded(FACTS)
        host.join()
        admitted = await host.hears(Admitted)
        assert (admitted.name, admitted.layout, admitted.echo_ns) == ("there", FACTS.layout, 1)
        assert admitted.engine.dtype == "float32"  # what it really is, not auto
        assert admitted.machine == machine_id()

    run(story)


def test_names_are_made_safe_and_unique_and_one_program_keeps_its_own():
    async def story(front: Front) -> None:
        front.membership.loaded(FACTS)
        names = []
        for number, name in enumerate(("gpu", "gpu", "../../É tc", "", "x" * 1000)):
            host = front.member(f"host-{number}")
            host.join(name=name)
            names.append((await host.hears(Admitted)).name)
        assert names == ["gpu", "gpu.2", "....tc", "host", "x" * 20]
        host.join(name="x" * 1000)
        assert (await host.hears(Admitted)).name == "x" * 20

    run(story)


def test_another_version_is_told_both():
    async def story(front: Front) -> None:
        front.membership.loaded(FACTS)
        host = front.member("host-1")
        for version, protocol in (("0.0.1", protocol_digest()), (VERSION, "0" * 16)):
            host.join(version=version, protocol=protocol)
            refused = await host.hears(Refused)
            for word in (version, VERSION, protocol, protocol_digest(), "install the same"):
                assert word in refused.reason

    run(story)


def test_a_silent_worker_is_suspected_then_dead_and_its_host_is_to_end_it():
    async def story(front: Front) -> None:
        host, worker = await joined(front)
        suspected = await front.is_told(WorkerSuspected)
        assert (suspected.worker_id, suspected.is_suspected) == (W, True)
        worker.ping()
        assert not (await front.is_told(WorkerSuspected)).is_suspected
        while not any(isinstance(event, WorkerLost) for event in front.events):
            host.ping()
            await asyncio.sleep(0.02)
        assert "silent for" in (await front.is_told(WorkerLost)).reason
        assert (await host.hears(Evict)).worker_id == W
        # It only stood still: whatever it says now is not heard, and its host is told again.
        worker.ping()
        assert (await host.hears(Evict)).epoch == 1
        assert front.killed == []

    run(story)


def test_a_worker_of_our_own_that_is_stuck_in_a_step_is_killed_here():
    async def story(front: Front) -> None:
        worker = front.member("decode-0")
        worker.hello(host="")
        await front.is_told(Hello)
        worker.ping(step_age_ns=61_000_000_000)
        lost = await front.is_told(WorkerLost)
        assert "stuck in a step for 61" in lost.reason
        assert front.killed == [("decode-0", 1)]

    run(story)


def test_the_same_hello_twice_is_nothing_but_one_that_had_lost_us_must_come_back_anew():
    async def story(front: Front) -> None:
        host, worker = await joined(front)
        worker.hello()
        worker.ping()
        await asyncio.sleep(0.05)
        assert front.news == []
        worker.hello(num_returns=1)
        assert "lost its controller" in (await front.is_told(WorkerLost)).reason
        assert (await host.hears(Evict)).worker_id == W

    run(story)


def test_a_newer_incarnation_takes_the_place_of_the_older_and_not_the_other_way_round():
    async def story(front: Front) -> None:
        _, worker = await joined(front)
        newer = front.member(W, epoch=2)
        newer.hello()
        assert (await front.is_told(Hello)).info.epoch == 2
        worker.hello()
        await asyncio.sleep(0.05)
        assert front.news == []

    run(story)


def test_what_hosts_say_of_their_workers_is_passed_on():
    async def story(front: Front) -> None:
        host, _ = await joined(front)
        host.say(Leave(worker_id=W, epoch=1))
        assert await front.is_told(Retire) == Retire(W, 1)
        host.say(Gone(worker_id=W, epoch=1, reason="killed"))
        assert (await front.is_told(WorkerLost)).reason == "killed"

    run(story)


def test_a_host_that_is_gone_leaves_its_name_and_comes_back_with_later_epochs():
    async def story(front: Front) -> None:
        front.membership.loaded(FACTS)
        first = front.member("host-1")
        first.join()
        epoch = (await first.hears(Admitted)).epoch
        worker = front.member(W, epoch=epoch + 10)
        worker.hello()
        await front.is_told(Hello)
        while front.membership._hosts:
            await asyncio.sleep(0.02)
        second = front.member("host-2")
        second.join()
        admitted = await second.hears(Admitted)
        assert (admitted.name, admitted.epoch >= epoch + 10) == ("there", True)

    run(story)
