"""The leak check must see what it is there for: a live child, an orphan, a segment."""

import os
import subprocess
import sys
from multiprocessing.shared_memory import SharedMemory

import psutil
import pytest

from tests.leaks import leak_check, live_descendants

NAME = f"penstock-leak-{os.getpid()}"
SLEEP = "import time; time.sleep(60)"
ORPHANING = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", {SLEEP!r}])
"""


def test_a_clean_body_passes():
    with leak_check(grace_s=0):
        subprocess.run([sys.executable, "-c", ""], check=True)
        segment = SharedMemory(create=True, size=1)
        segment.close()
        segment.unlink()


def test_a_living_child_is_named_and_killed():
    with (
        pytest.raises(pytest.fail.Exception, match=r"left behind: processes .*time\.sleep"),
        leak_check(grace_s=0),
    ):
        child = subprocess.Popen([sys.executable, "-c", SLEEP])
    assert child.wait(timeout=10) != 0


def test_a_grandchild_whose_parent_died_is_named_and_killed():
    with pytest.raises(pytest.fail.Exception, match=r"time\.sleep"), leak_check(grace_s=0):
        subprocess.run([sys.executable, "-c", ORPHANING], check=True)
    _, alive = psutil.wait_procs(live_descendants(), timeout=10)
    assert alive == []


def test_a_segment_is_named():
    with (
        pytest.raises(pytest.fail.Exception, match=f"shared memory .*{NAME}"),
        leak_check(grace_s=0),
    ):
        segment = SharedMemory(NAME, create=True, size=1)
    segment.close()
    segment.unlink()


def test_what_was_there_before_does_not_count(no_leaks):
    segment = SharedMemory(create=True, size=1)
    with leak_check(grace_s=0):
        pass
    segment.close()
    segment.unlink()
