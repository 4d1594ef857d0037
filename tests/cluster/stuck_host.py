"""A host whose workers get stuck in a step when a file says so. Started by the tests as a process
of its own, in place of the real one.
"""

import os
import sys
import time
from pathlib import Path

from penstock.cli import host
from penstock.core.step import Sampled, Step
from penstock.runtime.host import run_host
from penstock.runtime.instant import InstantExecutor

VARIABLE = "PENSTOCK_TEST_STUCK"


class StuckExecutor(InstantExecutor):
    """Runs steps until the file is there; then takes it away, and never comes back."""

    def execute(self, step: Step) -> tuple[Sampled, ...]:
        file = Path(os.environ[VARIABLE])
        if file.exists():
            file.unlink()
            time.sleep(600)
        return super().execute(step)


if __name__ == "__main__":
    host.InstantExecutor = StuckExecutor
    run_host(sys.argv[1:], host.load)
