"""What a worker says of its named blocks: what is there now, in batches, and not too often."""

from penstock.core.config import WorkerConfig
from penstock.core.events import Command, Send
from penstock.core.messages import BlocksChanged
from penstock.core.types import BlockHash, RequestId, Role, WorkerId
from penstock.kv.cache import KVCache
from penstock.sim.executor import chain_layout
from penstock.worker.names import NAMES_MAX, NameReports

INTERVAL_NS = 100


def make(num_blocks: int = 8, interval_ns: int | None = INTERVAL_NS) -> tuple[KVCache, NameReports]:
    config = WorkerConfig(
        worker_id=WorkerId("w"),
        role=Role.MIXED,
        epoch=3,
        layout=chain_layout(4),
        num_blocks=(num_blocks,),
        max_model_len=10**6,
        names_interval_ns=interval_ns,
    )
    kv = KVCache(config.layout, config.num_blocks)
    return kv, NameReports(config, kv)


def names(count: int, kind: str = "") -> list[BlockHash]:
    return [BlockHash(f"{kind}{i}".encode()) for i in range(count)]


def fill(kv: KVCache, name: str, hashes: list[BlockHash]) -> None:
    """Compute a request of so many full blocks, and let go of it."""
    request_id = RequestId(name)
    kv.open(request_id, [], 0)
    assert kv.grow(request_id, len(hashes) * 4)
    kv.advance(request_id, len(hashes) * 4, hashes)
    kv.close(request_id)


def said(commands: list[Command]) -> list[BlocksChanged]:
    messages = [c.message for c in commands if isinstance(c, Send)]
    return [m for m in messages if isinstance(m, BlocksChanged)]


def test_names_that_come_and_go_are_told_once() -> None:
    kv, reports = make()
    assert reports.due(0, is_idle=True) == []
    fill(kv, "a", names(4, "a"))
    (message,) = said(reports.due(5, is_idle=True))
    assert (message.worker_id, message.epoch) == ("w", 3)
    assert sorted(message.stored) == names(4, "a")
    assert message.removed == ()
    assert reports.due(6, is_idle=True) == []


def test_what_is_overwritten_is_told_and_what_came_back_is_there() -> None:
    kv, reports = make()
    fill(kv, "a", names(6, "a"))
    reports.due(0, is_idle=True)
    fill(kv, "b", names(8, "b"))  # evicts all of a
    fill(kv, "c", names(8, "a"))  # and all of b before anybody was told of it
    (message,) = said(reports.due(1, is_idle=True))
    assert sorted(message.stored) == names(8, "a")
    assert sorted(message.removed) == names(8, "b")


def test_a_busy_worker_waits_for_its_interval() -> None:
    kv, reports = make()
    fill(kv, "a", names(2, "a"))
    assert len(reports.due(0, is_idle=False)) == 1
    fill(kv, "b", names(2, "b"))
    assert reports.due(INTERVAL_NS - 1, is_idle=False) == []
    assert len(reports.due(INTERVAL_NS, is_idle=False)) == 1


def test_many_names_go_in_several_messages() -> None:
    kv, reports = make(num_blocks=2 * NAMES_MAX + 1)
    fill(kv, "a", names(2 * NAMES_MAX + 1))
    messages = said(reports.due(0, is_idle=True))
    assert [len(m.stored) for m in messages] == [NAMES_MAX, NAMES_MAX, 1]


def test_it_can_be_off() -> None:
    kv, reports = make(interval_ns=None)
    fill(kv, "a", names(4))
    assert reports.due(10**9, is_idle=True) == []
    assert kv.groups[0].pool.prefix_cache.changes is None


def test_everything_is_told_once_more_to_who_knows_nothing() -> None:
    kv, reports = make(num_blocks=2 * NAMES_MAX + 1)
    fill(kv, "a", names(NAMES_MAX + 1, "a"))
    reports.due(0, is_idle=True)
    fill(kv, "b", names(3, "b"))
    reports.begin_anew(names(2, "below"))
    messages = said(reports.due(1, is_idle=False))  # at once, however busy
    assert [len(m.stored) for m in messages] == [NAMES_MAX, 6]
    told = [name for message in messages for name in message.stored]
    assert sorted(told) == sorted(names(NAMES_MAX + 1, "a") + names(3, "b") + names(2, "below"))
    assert {m.epoch for m in messages} == {3}
    assert reports.due(INTERVAL_NS + 1, is_idle=True) == []
    fill(kv, "c", names(1, "c"))
    (message,) = said(reports.due(INTERVAL_NS + 2, is_idle=True))
    assert [*message.stored] == names(1, "c")


def test_who_tells_no_names_tells_none_when_asked() -> None:
    kv, reports = make(interval_ns=None)
    fill(kv, "a", names(4))
    reports.begin_anew()
    assert reports.due(10**9, is_idle=True) == []


def test_a_worker_that_has_names_already_begins_with_them() -> None:
    kv, _ = make(interval_ns=None)
    fill(kv, "a", names(3))
    assert sorted(kv.watch_names()) == names(3)
