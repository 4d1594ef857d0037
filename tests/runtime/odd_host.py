"""A host whose workers do what their names say. Started by the tests as a process of its own."""

import os
import signal
import sys
import time
from collections.abc import Callable

from penstock.core.errors import StartupFailed
from penstock.runtime.host import RunWorker, run_host
from penstock.runtime.instant import instant_layout
from penstock.runtime.link import WorkerSpec
from penstock.runtime.settings import ClusterSettings, ModelFacts
from penstock.runtime.worker import WorkerPlace

FACTS = ModelFacts(
    folder="",
    layout=instant_layout(16),
    num_blocks=(8,),
    max_model_len=128,
    eos_token_ids=(0,),
    vocab_size=100,
    description="odd",
)


def load(
    settings: ClusterSettings, progress: Callable[[str, float], None]
) -> tuple[ModelFacts, RunWorker]:
    progress("thinking", 0.5)
    match settings.engine.model:
        case "missing":
            raise StartupFailed("there is no such model")
        case "huge":
            raise MemoryError
        case "broken":
            raise ZeroDivisionError("a bug while loading")
        case "slow":
            time.sleep(600)
    return FACTS, work


def work(spec: WorkerSpec, place: WorkerPlace) -> None:
    match spec.worker_id:
        case "quits":
            return
        case "raises":
            raise ValueError("a bug in the worker")
        case "dies":
            sys.stderr.write("last words")
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exits":
            sys.exit(7)
        case "waits":
            sys.stderr.write("waiting\n")
            time.sleep(600)
        case "watches":
            os.read(place.front_fd, 1)
            os.write(2, b"the front is gone\n")


if __name__ == "__main__":
    run_host(sys.argv[1:], load)
