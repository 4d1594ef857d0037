"""The host process: loads the model once, then forks a worker whenever the front asks for one.

Forked workers share weights and imports copy-on-write, so a model is in memory once however many
workers there are, and a dead worker is replaced in about 0.1 s. For that, this process has one
thread, no ZeroMQ context and no OpenMP team; it waits for its children and says how they ended.

It ends when the front does. Terminal signals are for the front alone, which then tells everybody.
"""

import faulthandler
import gc
import logging
import os
import select
import selectors
import shutil
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType

from penstock.core.block import KVLayout
from penstock.core.errors import PenstockError, StartupFailed
from penstock.core.types import WorkerId
from penstock.runtime.clock import HostTime
from penstock.runtime.link import (
    Exited,
    Failed,
    Fork,
    Forked,
    Kill,
    Link,
    Prepare,
    Progress,
    Ready,
    ToHost,
    WorkerSpec,
    host_link,
)
from penstock.runtime.processes import describe_code, die_with_parent, name_process
from penstock.runtime.settings import ClusterSettings, ModelFacts
from penstock.runtime.worker import WorkerPlace

LAST_LINES = 20
LINE_CHARACTERS_MAX = 4096
_log = logging.getLogger(__name__)


class _Child:
    """A living worker process. `stderr_fd` is the end of its output that we read."""

    def __init__(self, spec: WorkerSpec, pid: int, stderr_fd: int) -> None:
        self.spec = spec
        self.pid = pid
        self.pid_fd = os.pidfd_open(pid)
        self.stderr_fd = stderr_fd
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self.partial_line = ""


class Host:
    """Owns the processes that it forked. `run_worker` is what each of them does."""

    def __init__(self, link: Link[ToHost], run_worker: Callable[[WorkerSpec], None]) -> None:
        self._link = link
        self._run_worker = run_worker
        self._children: dict[tuple[WorkerId, int], _Child] = {}
        self._selector = selectors.DefaultSelector()
        self._is_front_up = True

    def serve(self) -> None:
        """Fork and reap until the front is gone; then end every worker."""
        # What exists now is never collected, hence never written to, hence stays shared.
        gc.collect()
        gc.freeze()
        num_threads = len(list(Path("/proc/self/task").iterdir()))
        if num_threads > 1:
            _log.warning("%d threads in the host: only one survives in a worker", num_threads)
        self._selector.register(self._link, selectors.EVENT_READ, self._obey)
        try:
            while self._is_front_up:
                for key, _ in self._selector.select():
                    # One callback may have closed what another one was to read.
                    if self._selector.get_map().get(key.fd) == key:
                        key.data()
        finally:
            self._kill_all()

    def _obey(self) -> None:
        match self._link.receive():
            case Fork(spec):
                self._fork(spec)
            case Kill(worker_id, epoch):
                child = self._children.get((worker_id, epoch))
                if child is not None:
                    os.kill(child.pid, signal.SIGKILL)
            case None:
                self._is_front_up = False
            case message:
                raise AssertionError(f"{message} came twice")

    def _fork(self, spec: WorkerSpec) -> None:
        read_fd, write_fd = os.pipe()
        host_pid = os.getpid()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._live(spec, write_fd, host_pid)
        os.close(write_fd)
        os.set_blocking(read_fd, False)
        child = _Child(spec, pid, read_fd)
        self._children[spec.worker_id, spec.epoch] = child
        self._selector.register(read_fd, selectors.EVENT_READ, lambda: self._listen(child))
        self._selector.register(child.pid_fd, selectors.EVENT_READ, lambda: self._reap(child))
        self._link.send(Forked(spec.worker_id, spec.epoch, pid))

    def _live(self, spec: WorkerSpec, stderr_fd: int, host_pid: int) -> None:
        """Be a worker; does not return, and nothing of the host's ending runs here."""
        code = 1
        try:
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)
            die_with_parent(signal.SIGKILL, host_pid)
            name_process(spec.worker_id)
            os.dup2(stderr_fd, 1)
            os.dup2(stderr_fd, 2)
            os.close(stderr_fd)
            self._leave_to_host()
            faulthandler.enable()
            self._run_worker(spec)
            code = 0
        except PenstockError as error:
            sys.stderr.write(f"{error}\n")
        finally:
            if sys.exception() is not None:
                sys.excepthook(*sys.exc_info())
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _leave_to_host(self) -> None:
        """Close the worker's copies of what belongs to the host."""
        self._selector.close()
        self._link.close()
        for child in self._children.values():
            os.close(child.pid_fd)
            os.close(child.stderr_fd)

    def _listen(self, child: _Child) -> None:
        if not self._pass_on_output(child):
            self._selector.unregister(child.stderr_fd)

    def _pass_on_output(self, child: _Child) -> bool:
        """Repeat what a worker wrote, and remember the end of it; False when there is no more."""
        try:
            chunk = os.read(child.stderr_fd, 65536)
        except BlockingIOError:
            return True
        text = child.partial_line + chunk.decode(errors="replace")
        *lines, child.partial_line = text.split("\n")
        if child.partial_line and (not chunk or len(child.partial_line) > LINE_CHARACTERS_MAX):
            lines.append(child.partial_line)
            child.partial_line = ""
        child.last_lines.extend(lines)
        with suppress(BrokenPipeError):
            for line in lines:
                sys.stderr.write(f"[{child.spec.worker_id}] {line}\n")
            sys.stderr.flush()
        return bool(chunk)

    def _reap(self, child: _Child) -> None:
        _, status = os.waitpid(child.pid, 0)
        spec = child.spec
        del self._children[spec.worker_id, spec.epoch]
        # A process that the worker left behind may hold the pipe open: read what is there, no more.
        while self._pass_on_output(child) and select.select([child.stderr_fd], [], [], 0)[0]:
            pass
        for fd in (child.pid_fd, child.stderr_fd):
            if fd in self._selector.get_map():
                self._selector.unregister(fd)
            os.close(fd)
        reason = describe_code(os.waitstatus_to_exitcode(status))
        self._link.send(Exited(spec.worker_id, spec.epoch, reason, tuple(child.last_lines)))

    def _kill_all(self) -> None:
        for child in self._children.values():
            os.kill(child.pid, signal.SIGKILL)
        for child in self._children.values():
            os.waitpid(child.pid, 0)


RunWorker = Callable[[WorkerSpec, WorkerPlace], None]
Load = Callable[[ClusterSettings, Callable[[str, float], None]], tuple[ModelFacts, RunWorker]]


def run_host(arguments: Sequence[str], load: Load) -> None:
    """Be the host process, as `HostProcess.spawn` started it.

    `load` gets the settings and whom to tell of its progress; it returns the model's facts and what
    a forked worker does.
    """
    link_fd, front_fd, front_pid = map(int, arguments[:3])
    folder = Path(arguments[3])
    with _living_with_front(front_pid, folder):
        link = host_link(link_fd)
        prepare = link.receive()
        if not isinstance(prepare, Prepare):
            return
        try:
            model, run_worker = load(prepare.settings, partial(_tell, link))
            _compare(model.layout, prepare.layout)
        except StartupFailed as error:
            link.send(Failed(str(error)))
            return
        except MemoryError:
            link.send(Failed("the model does not fit into the memory of this machine"))
            return
        place = WorkerPlace(
            folder=folder,
            controller_address=prepare.controller_address,
            front_fd=front_fd,
            decision_log=prepare.settings.decision_log,
            network=prepare.settings.network,
            pulse=prepare.settings.pulse,
            host=prepare.settings.host,
            is_remote=prepare.controller_address.startswith("tcp:"),
            is_same_machine=prepare.clock_offset_ns is None,
            time=HostTime(prepare.clock_offset_ns or 0),
        )
        link.send(Ready(model))
        Host(link, lambda spec: run_worker(spec, place)).serve()


def _compare(ours: KVLayout | None, theirs: KVLayout | None) -> None:
    """Make sure that what was loaded is what the cluster serves, before anybody is forked."""
    refusal = ours.incompatibility(theirs) if ours is not None and theirs is not None else None
    if refusal is not None:
        raise StartupFailed(f"this model is not the one that the cluster serves: {refusal}")


def _tell(link: Link[ToHost], stage: str, fraction: float) -> None:
    link.send(Progress(stage, fraction))


@contextmanager
def _living_with_front(front_pid: int, folder: Path) -> Iterator[None]:
    """Ignore the terminal, and end with the front, even while loading; then remove `folder`.

    The kernel's word is SIGUSR1 because SIGTERM may come to every process of a service at once,
    and then it is for the front to drain first.
    """

    def end(_signal_number: int, _frame: FrameType | None) -> None:
        # Here too: the exception may come up in the midst of the same clean-up below.
        shutil.rmtree(folder, ignore_errors=True)
        raise SystemExit(1)

    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, end)
    try:
        die_with_parent(signal.SIGUSR1, front_pid)
        yield
    finally:
        if os.getppid() != front_pid:
            shutil.rmtree(folder, ignore_errors=True)
