"""What the controller and other hosts say to each other about who is there.

Part of the messages of `core/messages.py`; knows no request. A host with workers asks to be let in
(`Join`) before it loads anything; its workers then introduce themselves (`Hello`). Every member and
the controller tell each other that they are alive (`Ping`).
"""

from msgspec import Struct

from penstock.core.block import KVLayout
from penstock.core.config import EngineConfig
from penstock.core.types import WorkerId


class Join(Struct, frozen=True, tag=True, kw_only=True):
    """Another host asks to be let in with workers. Answered at `address`.

    `host` is new for every start of the program there; `name` is what its workers would like to be
    called after. `version` and `protocol` must be the controller's. `machine` is the same for all
    processes that share a clock. Fields are only ever added: other versions must understand it.
    """

    host: WorkerId
    address: str
    name: str = ""
    version: str = ""
    protocol: str = ""
    machine: str = ""
    sent_ns: int = 0


class Admitted(Struct, frozen=True, tag=True, kw_only=True):
    """Be welcome. Load what `engine` says and start workers named after `name`, their incarnations
    counted from `epoch`.

    `layout` is that of the cluster's blocks, None while nobody has loaded the model. `echo_ns` is
    when the other side asked, by its own clock, and `now_ns` when it was answered, by ours.
    """

    name: str
    epoch: int
    engine: EngineConfig
    executor: str
    layout: KVLayout | None
    machine: str
    echo_ns: int
    now_ns: int


class Refused(Struct, frozen=True, tag=True, kw_only=True):
    """You cannot be let in; `reason` says what to change."""

    reason: str


class Ping(Struct, frozen=True, tag=True, kw_only=True):
    """I am alive. Said by both sides of a link at an interval.

    `sent_ns` is by the sender's clock. `echo_ns` is the `sent_ns` of the last one that it heard
    from the other side, which it has held for `held_ns`; 0 for none. `step_age_ns` is how long the
    step under way has taken so far.
    """

    sender: WorkerId
    epoch: int
    sent_ns: int
    echo_ns: int = 0
    held_ns: int = 0
    step_age_ns: int = 0


class Gone(Struct, frozen=True, tag=True, kw_only=True):
    """A worker process of this host has ended."""

    worker_id: WorkerId
    epoch: int
    reason: str


class Evict(Struct, frozen=True, tag=True, kw_only=True):
    """This incarnation counts as dead, whatever it is doing: end its process."""

    worker_id: WorkerId
    epoch: int
    reason: str


class Leave(Struct, frozen=True, tag=True, kw_only=True):
    """This worker would like to go: give it nothing new, and `Stop` it when it has nothing."""

    worker_id: WorkerId
    epoch: int
