"""What a process asks of Linux."""

import os
import signal
import subprocess
import sys

import psutil

from penstock.runtime.processes import available_bytes, describe_code, usable_cores

ORPHAN = """
import os, signal, subprocess, sys, time
from penstock.runtime.processes import die_with_parent
child = subprocess.Popen([sys.executable, "-c", '''
import os, signal, sys, time
from penstock.runtime.processes import die_with_parent
die_with_parent(signal.SIGKILL, int(sys.argv[1]))
print("ready", flush=True)
time.sleep(60)
''', str(os.getpid())], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


def test_how_a_process_ended_is_said_in_words():
    assert describe_code(0) == "exit code 0"
    assert describe_code(3) == "exit code 3"
    assert describe_code(-signal.SIGSEGV) == "killed by SIGSEGV"
    assert "want of memory" in describe_code(-signal.SIGKILL)


def test_there_is_at_least_a_core_and_some_memory():
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    assert 0 < available_bytes() <= psutil.virtual_memory().total


def test_a_child_dies_with_its_parent(no_leaks):
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        parent.wait(10)
        assert psutil.wait_procs([child], timeout=30)[1] == []


def test_a_child_whose_parent_is_gone_already_dies_at_once():
    code = (
        "import signal; from penstock.runtime.processes import die_with_parent\n"
        "die_with_parent(signal.SIGKILL, 1 << 22)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=30)
    assert done.returncode == -signal.SIGKILL
