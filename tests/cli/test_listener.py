"""The listening socket, and what is said when there cannot be one."""

import socket
import tempfile
from pathlib import Path

import pytest

from penstock.cli.listener import Listener
from penstock.core.errors import StartupFailed


def test_port_0_takes_a_free_one_and_says_which():
    listener = Listener.tcp("127.0.0.1", 0)
    port = listener.socket.getsockname()[1]
    assert listener.address == f"http://127.0.0.1:{port}"
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    assert not listener.is_open_to_others
    listener.close()


class BoundTo:
    """A socket bound to an address at which a test must not listen."""

    def __init__(self, address: str) -> None:
        self._address = address

    def getsockname(self) -> tuple[str, int]:
        return self._address, 80


@pytest.mark.parametrize(
    ("address", "is_open"),
    [("0.0.0.0", True), ("::", True), ("10.1.2.3", True), ("127.0.0.2", False), ("::1", False)],
)
def test_an_address_that_others_can_reach_is_known_as_such(address: str, is_open: bool):
    assert Listener(BoundTo(address), "").is_open_to_others is is_open


def test_an_ipv6_address_is_written_as_urls_want_it():
    try:
        listener = Listener.tcp("::1", 0)
    except StartupFailed:
        pytest.skip("no IPv6 here")
    assert listener.address.startswith("http://[::1]:")
    listener.close()


def test_what_is_wrong_is_said(free_port: int):
    with (
        socket.create_server(("127.0.0.1", free_port)),
        pytest.raises(StartupFailed, match=rf"port {free_port} is taken.*--port 0"),
    ):
        Listener.tcp("127.0.0.1", free_port)
    with pytest.raises(StartupFailed, match=r"192\.0\.2\.1: this machine has no such"):
        Listener.tcp("192.0.2.1", 0)
    with pytest.raises(StartupFailed, match=r"--host no\.such\.host\.invalid"):
        Listener.tcp("no.such.host.invalid", 0)


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="pt-") as path:
        yield Path(path)


def test_a_unix_socket_is_private_and_goes_with_its_listener(folder: Path):
    path = folder / "s"
    listener = Listener.unix(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert listener.address == f"unix:{path}"
    with pytest.raises(StartupFailed, match="choose another path"):
        Listener.unix(path)
    listener.close()
    assert not path.exists()


def test_a_socket_left_behind_is_replaced_and_a_file_is_not(folder: Path):
    path = folder / "s"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    Listener.unix(path).close()
    path.write_text("precious")
    with pytest.raises(StartupFailed, match="choose another path"):
        Listener.unix(path)
    assert path.read_text() == "precious"
