"""What a server shows in a terminal."""

import re
import tempfile
from contextlib import closing

import pytest

from tests.cli.terminal import Terminal

pytestmark = pytest.mark.usefixtures("no_leaks")


def test_a_table_of_what_came_up_and_ctrl_c_ends_it(free_port: int):
    with tempfile.TemporaryDirectory(prefix="pt-") as folder:
        terminal = Terminal(
            *f"serve --executor instant --decode 2 --port {free_port}".split(),
            XDG_RUNTIME_DIR=folder,
        )
        with closing(terminal):
            shown = terminal.read_until("ready after") + terminal.read_until("}'")
            plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
            rows = [line.split() for line in plain.splitlines()]
            assert ["worker", "role", "pid", "KV", "tokens", "sequences"] in rows
            workers = {row[0]: row for row in rows if len(row) == 5 and row[2].isdecimal()}
            assert set(workers) == {"prefill-0", "decode-0", "decode-1"}
            assert workers["decode-1"][1] == "decode"
            assert "prefill-0 → decode-1 shm (memfd)" in plain
            assert "NO MODEL RUNS" in plain
            assert f"curl http://127.0.0.1:{free_port}/v1/chat/completions" in plain
            terminal.type("\x03")
            assert terminal.end() == 0
