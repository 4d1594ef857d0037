"""What the load generator makes of a stream: tokens are what was asked for, events may be fewer."""

import asyncio
import importlib.util
import sys
from pathlib import Path

import pytest

LOAD = Path(__file__).parents[2] / "bench" / "load.py"
TEXT = b'data: {"choices":[{"index":0,"text":"a","logprobs":null,"finish_reason":null}]}\n\n'
END = b'data: {"choices":[{"index":0,"text":"","logprobs":null,"finish_reason":"length"}]}\n\n'
BODY = {"prompt": [1], "max_tokens": 5, "ignore_eos": True, "stream": True}


@pytest.fixture
def load(monkeypatch):
    """Load the module by its path: what is in `bench/` is no package."""
    spec = importlib.util.spec_from_file_location("bench_load", LOAD)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_load", module)
    spec.loader.exec_module(module)
    return module


async def ask(load, *chunks: bytes):
    """Have one request answered by these chunks."""

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for chunk in (*chunks, b""):
            writer.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            await writer.drain()
            await asyncio.sleep(0.01)
        await reader.read()
        writer.close()
        await writer.wait_closed()
        is_over.set()

    is_over = asyncio.Event()
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        client = load.Client(*server.sockets[0].getsockname())
        got = await client.complete(BODY)
        client.close()
        await is_over.wait()
        return got


def test_the_event_that_ends_a_choice_is_no_token(load):
    got = asyncio.run(ask(load, TEXT, TEXT, TEXT, TEXT, TEXT + END))
    assert (got.num_tokens, len(got.token_s)) == (5, 5)
    assert got.is_complete
    assert got.is_token_by_token
    assert got.tpot_s == pytest.approx((got.token_s[-1] - got.token_s[0]) / 4)


def test_tokens_that_come_with_others_count_and_so_does_a_last_one_without_text(load):
    got = asyncio.run(ask(load, TEXT, TEXT, END))
    assert (got.num_tokens, len(got.token_s)) == (5, 2)
    assert not got.is_token_by_token
    assert got.tpot_s == pytest.approx((got.ended_s - got.token_s[0]) / 4)
    assert got.ended_s > got.token_s[-1]


def test_an_answer_that_breaks_off_is_not_complete(load):
    assert not asyncio.run(ask(load, TEXT, TEXT)).is_complete
