"""What is wrong with a machine is found."""

import os
import resource
import socket

import pytest

from penstock.cli.checks import machine
from penstock.cli.checks.finding import Extent, State
from penstock.cli.checks.machine import (
    check_cores,
    check_limits,
    check_memory,
    check_port,
    check_system,
)
from penstock.core.types import GIB, MIB


@pytest.mark.parametrize(
    ("available", "state"),
    [(100 * MIB, State.FAILED), (GIB, State.WARNING), (16 * GIB, State.OK)],
)
def test_memory(monkeypatch, available: int, state: State):
    monkeypatch.setattr(machine, "available_bytes", lambda: available)
    memory, _ = check_memory(Extent())
    assert memory.state is state
    assert memory.figures["kv_cache_bytes"] == available / 4
    assert bool(memory.advice) is (state is not State.OK)


def test_small_shared_memory_is_told_though_not_needed(monkeypatch):
    monkeypatch.setattr(
        machine.os, "statvfs", lambda _path: os.statvfs_result((1, 4096, 16, *[0] * 7))
    )
    finding = machine._shm_finding()
    assert finding.state is State.WARNING
    assert "--shm-size" in finding.advice


def test_one_core(monkeypatch):
    monkeypatch.setattr(machine, "usable_cores", lambda: 1)
    (finding,) = check_cores(Extent())
    assert finding.state is State.WARNING
    assert "--mixed 1" in finding.advice


def test_threads_set_in_the_environment_are_told_to_be_without_effect(monkeypatch):
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (finding,) = check_cores(Extent())
    assert finding.state is State.OK
    assert "4 compute thread(s)" in finding.said
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    (finding,) = check_cores(Extent())
    assert finding.state is State.WARNING
    assert "OMP_NUM_THREADS" in finding.said
    assert "--threads" in finding.advice


def test_few_open_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        finding = next(iter(check_limits(Extent())))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert finding.state is State.WARNING
    assert "1024" in finding.said


def test_a_taken_port(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(machine, "PORT", taken.getsockname()[1])
        (finding,) = check_port(Extent())
    assert finding.state is State.WARNING
    assert "--port" in finding.said
    (finding,) = check_port(Extent())
    assert finding.state is State.OK


def test_a_system_that_is_not_linux_and_one_that_is_too_old(monkeypatch):
    assert [finding.state for finding in check_system(Extent())] == [State.OK, State.OK]

    def refuse(_pid: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(machine.os, "pidfd_open", refuse)
    (finding,) = check_system(Extent())
    assert finding.state is State.FAILED
    assert "seccomp" in finding.advice
    monkeypatch.setattr(machine.platform, "system", lambda: "Darwin")
    (finding,) = check_system(Extent())
    assert finding.said.startswith("Darwin")
