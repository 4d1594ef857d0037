"""What may be said on the command line."""

import argparse
import subprocess
import sys

import pytest

from penstock.cli.arguments import make_parser
from penstock.cli.values import parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1GiB", 1 << 30),
        ("512MiB", 512 << 20),
        ("1.5g", 1_500_000_000),
        ("2GB", 2_000_000_000),
        ("64 KiB", 65536),
        ("1000000", 1_000_000),
        ("7b", 7),
    ],
)
def test_sizes(text: str, size: int):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "1TiB", "-1GiB", "0", "0.1", "1e999", "one", "1 2"])
def test_what_is_no_size(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match=r"size|small"):
        parse_bytes(text)


@pytest.mark.parametrize("command", [[], ["serve"], ["chat"], ["explain"]])
def test_help_has_examples_or_says_what_to_type(command: list[str], capsys):
    with pytest.raises(SystemExit) as end:
        make_parser().parse_args([*command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "penstock serve" in text or "/reset" in text
    assert "--executor" not in text  # it is there for benches only
    assert max(map(len, text.splitlines())) <= 120


def test_help_is_quick_because_nothing_heavy_is_imported():
    code = (
        "import sys; from penstock.cli import main\n"
        "try: main(['--version'])\n"
        "finally: print(sorted({m.split('.')[0] for m in sys.modules} "
        "& {'torch', 'numpy', 'asyncio', 'uvicorn', 'starlette', 'transformers', 'rich'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout.splitlines() == ["penstock 0.1.0", "[]"], done.stderr
