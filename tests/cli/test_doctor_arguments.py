"""What may be said to the doctor."""

import argparse

import pytest

from penstock.cli.arguments import make_parser
from penstock.cli.doctor_arguments import address


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("10.0.0.5:7000", ("10.0.0.5", 7000)),
        ("[::1]:0", ("::1", 0)),
        ("host:65535", ("host", 65535)),
    ],
)
def test_addresses(text: str, meant: tuple[str, int]):
    assert address(text) == meant


@pytest.mark.parametrize("text", ["", "host", ":7000", "host:", "host:x", "host:65536", "host:-1"])
def test_what_is_no_address(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match="HOST:PORT"):
        address(text)


def test_several_peers_or_none():
    parse = make_parser().parse_args
    assert parse(["doctor"]).peers == []
    assert parse(["doctor", "a:1, b:2"]).peers == [("a", 1), ("b", 2)]
    assert parse(["doctor", "--listen", "0.0.0.0:7"]).listen == ("0.0.0.0", 7)


def test_help_shows_how_to_use_it(capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args(["doctor", "--help"])
    text = capsys.readouterr().out
    assert "penstock doctor --json" in text
    assert max(map(len, text.splitlines())) <= 120
