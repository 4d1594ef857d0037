"""`penstock kv`: how what is where reads, and what may be asked."""

from argparse import Namespace

import pytest

from penstock.cli.arguments import make_parser
from penstock.cli.kv import kv, tell

ANSWER = {
    "workers": [
        {
            "id": "d0",
            "epoch": 1,
            "onboards": 0,
            "pools": [
                {
                    "window": 0,
                    "blocks": 80,
                    "active": 20,
                    "cached": 30,
                    "free": 30,
                    "longest_free_run": 25,
                    "block_bytes": 4096,
                    "codec": "raw",
                    "retained": 4,
                }
            ],
            "tiers": [
                {
                    "name": "dram",
                    "slots": 40,
                    "used": 11,
                    "codec": "int8",
                    "slot_bytes": 2048,
                    "arriving": 1,
                    "reading": 2,
                    "hits": 9,
                    "bytes_in": 3 << 20,
                    "bytes_out": 512,
                    "corrupt": 1,
                    "failed": 0,
                    "evicted": 0,
                    "exposed_ns": 2_500_000,
                    "decode_ns": 17_000,
                    "raw_bytes_in": 6 << 20,
                    "raw_bytes_out": 1024,
                    "codec_encode_ns": 3_000_000,
                    "codec_decode_ns": 100_000,
                    "codec_exposed_ns": 50_000,
                }
            ],
        }
    ],
    "silent": ["d1"],
    "blocks": [
        {
            "worker": "d0",
            "place": "device",
            "group": 0,
            "index": 7,
            "state": "cached",
            "name": "00ff" * 8,
            "codec": "raw",
            "temperature": "warm",
            "bytes": 4096,
            "holders": 0,
            "idle_s": 31.4,
            "retained_s": 60.0,
            "decode_us": 17.4,
            "in_flight": "to dram",
        }
    ],
    "next": "d0:0:8",
}


def options(*words: str) -> Namespace:
    return make_parser().parse_args(["kv", *words])


def test_pools_tiers_and_blocks_are_rows():
    lines = list(tell(ANSWER))
    (pool,) = (line for line in lines if line.startswith("d0 device"))
    assert " ".join(pool.split()) == "d0 device 80 20 30 30 25 raw, 4 retained"
    (tier,) = (line for line in lines if line.startswith("d0 dram"))
    assert " ".join(tier.split()) == (
        "d0 dram 40 11 9 3.0 MiB 512 B 2.5 ms 3 int8 (0.50 of a block, 17 us to decode one; "
        "3.0 ms in, 0.1 ms out, 0.1 exposed), 1 corrupt"
    )
    (block,) = (line for line in lines if "00ff" in line)
    expected = "d0 device 7 00ff00ff00ff cached raw warm 0 31.4 s 60 s 17 us to dram"
    assert " ".join(block.split()) == expected
    assert "d1: did not answer in time; the figures are without it" in lines
    assert lines[-1] == "there are more: --after d0:0:8"


def test_without_workers_that_is_said():
    assert list(tell({"workers": [], "silent": []})) == ["no worker is up"]


PATHS: list[str] = []


class Asked:
    """A server that remembers what it was asked."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = url

    def get(self, path: str) -> dict:
        PATHS.append(path)
        return ANSWER


def test_options_are_asked_for_and_a_silent_worker_is_a_failure(monkeypatch, capsys):
    monkeypatch.setattr("penstock.cli.client.ChatClient", Asked)
    words = "--url http://there --blocks --limit 5 --prefix 00 --json"
    assert kv(options(*words.split())) == 1
    assert PATHS[-1] == "/kv/residency?prefix=00&limit=5&detail=1"
    assert '"silent": ["d1"]' in capsys.readouterr().out
    kv(options())
    assert PATHS[-1] == "/kv/residency"


def test_watching_ends_with_ctrl_c(monkeypatch, capsys):
    monkeypatch.setattr("penstock.cli.client.ChatClient", Asked)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("penstock.cli.kv.time.sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        kv(options("--watch", "0.5"))
    assert slept == [0.5, 0.5]
    assert capsys.readouterr().out.count("d0 dram") == 2


def test_misuse_is_refused(capsys):
    with pytest.raises(SystemExit):
        options("--watch", "0")
    assert "seconds" in capsys.readouterr().err
