"""`penstock chat` against a server that runs no model, and against none."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from penstock.cli import main
from tests.cli.server import ROOT, Server, serving
from tests.cli.terminal import Terminal


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="pt-", ignore_cleanup_errors=True) as folder:
        from socket import create_server

        with create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        with serving(port=port, folder=Path(folder)) as server:
            server.wait_until_up()
            yield server


def converse(server: Server, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    url = f"http://127.0.0.1:{server.port}"
    return subprocess.run(
        [sys.executable, "-m", "penstock", "chat", "--url", url, *options],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_a_piped_conversation_prints_answers_and_nothing_else(server: Server):
    done = converse(server, "Hello\nAnd now?\n", "--max-tokens", "5", "--seed", "1")
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    assert len(answers) >= 2
    assert done.stderr.count("first token after") == 2
    assert "5 tokens, " in done.stderr
    # The same again is the same: the seed is passed on, and the second answer saw the first.
    assert converse(server, "Hello\nAnd now?\n", "--max-tokens", "5", "--seed", "1").stdout == (
        done.stdout
    )


def test_reset_forgets(server: Server):
    options = ("--max-tokens", "5", "--seed", "1")
    once = converse(server, "Hello\n", *options).stdout
    assert converse(server, "Hello\n/reset\nHello\n", *options).stdout == once + once
    assert converse(server, "Hello\nHello\n", *options).stdout != once + once


def test_quit_and_unknown_commands(server: Server):
    done = converse(server, "/what\n/quit\nHello\n")
    assert done.returncode == 0
    assert done.stdout == ""
    assert "there is no /what" in done.stderr


def test_a_refusal_is_shown_with_advice_and_not_remembered(server: Server):
    done = converse(server, "word " * 5000 + "\nHello\n", "--max-tokens", "5")
    assert done.returncode == 1
    assert "/reset starts a new conversation" in done.stderr
    assert "first token after" in done.stderr  # the next one was answered


def test_a_wrong_model_is_explained(server: Server):
    done = converse(server, "Hello\n", "--model", "gpt")
    assert done.returncode == 1
    assert "served: instant-executor-no-model" in done.stderr


def test_without_a_server_it_says_how_to_start_one(free_port: int, capsys):
    assert main(["chat", "--url", f"http://127.0.0.1:{free_port}"]) == 1
    assert "start one with: penstock serve" in capsys.readouterr().err


def test_a_url_that_is_none_is_refused(capsys):
    assert main(["chat", "--url", "ftp://x"]) == 1
    assert "is not an address such as" in capsys.readouterr().err


def test_in_a_terminal_an_answer_can_be_stopped(server: Server):
    url = f"http://127.0.0.1:{server.port}"
    terminal = Terminal("chat", "--url", url, "--max-tokens", "4000")
    with closing(terminal):
        terminal.read_until("> ")
        terminal.type("Hello\n")
        terminal.read_until("Hello\r\n")
        terminal.read_until(" ")  # the answer has begun
        terminal.type("\x03")
        terminal.read_until("ended by stopped")
        terminal.read_until("> ")
        terminal.type("/quit\n")
        assert terminal.end() == 0
