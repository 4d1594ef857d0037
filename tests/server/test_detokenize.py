"""Streams of text against decoding the whole, for every family of tokenizers."""

import random

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from penstock.server.detokenize import ByteStream, PrefixStream
from penstock.server.tokenizer import Tokenizer
from tests.server import tokenizers_of

BYTE_LEVEL = Tokenizer(tokenizers_of.byte_level())
SENTENCEPIECE = Tokenizer(tokenizers_of.sentencepiece())
METASPACE = Tokenizer(tokenizers_of.metaspace())
WORDPIECE = Tokenizer(tokenizers_of.wordpiece())
SUFFIXED = Tokenizer(tokenizers_of.suffixed())


def _streamed(tokenizer: Tokenizer, prompt: list[int], output: list[int], **options) -> str:
    stream = tokenizer.stream(prompt, **options)
    return "".join([*map(stream.push, output), stream.flush()])


def _ids(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30)


@given(_ids(BYTE_LEVEL), st.booleans())
def test_byte_level_equals_the_whole_for_any_tokens(ids, skips):
    whole = BYTE_LEVEL.decode(ids, skip_special_tokens=skips)
    assert _streamed(BYTE_LEVEL, [], ids, skip_special_tokens=skips) == whole


@given(st.text("he lo w好😀é.", max_size=30), st.integers(0, 8))
def test_a_prompt_and_its_continuation_are_the_whole(text, cut):
    for tokenizer in (BYTE_LEVEL, SENTENCEPIECE, METASPACE):
        ids = tokenizer.encode(text)
        while cut < len(ids) and _splits_a_character(tokenizer, ids[:cut]):
            cut += 1
        prompt, output = ids[:cut], ids[cut:]
        assert tokenizer.decode(prompt) + _streamed(tokenizer, prompt, output) == tokenizer.decode(
            ids
        )


def _splits_a_character(tokenizer: Tokenizer, ids: list[int]) -> bool:
    return tokenizer.decode(ids).endswith("\ufffd")


@given(_ids(METASPACE))
def test_metaspace_equals_the_whole_for_any_tokens(ids):
    assert _streamed(METASPACE, [], ids) == METASPACE.decode(ids)


@pytest.mark.parametrize("tokenizer", [WORDPIECE, SUFFIXED])
def test_other_decoders_equal_the_whole(tokenizer):
    draw = random.Random(0)
    for _ in range(300):
        ids = [draw.randrange(1, tokenizer.vocab_size) for _ in range(draw.randrange(1, 12))]
        assert isinstance(tokenizer.stream([]), PrefixStream)
        cut = draw.randrange(len(ids))
        joined = tokenizer.decode(ids[:cut]) + _streamed(tokenizer, ids[:cut], ids[cut:])
        # A suffix decoder writes the end of the last word differently until it knows the next one.
        assert joined == tokenizer.decode(ids) or tokenizer is SUFFIXED
        assert joined.replace(" ", "") == tokenizer.decode(ids).replace(" ", "")


def test_a_character_leaves_whole():
    ids = BYTE_LEVEL.encode("a😀b")
    stream = BYTE_LEVEL.stream([])
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) == "a😀b"
    assert len(ids) > 3, "the emoji has several tokens"
    assert all("\ufffd" not in piece for piece in pieces)
    assert "😀" in pieces


def test_an_unfinished_character_is_replaced_at_the_end():
    ids = BYTE_LEVEL.encode("a好")[:-1]
    assert _streamed(BYTE_LEVEL, [], ids) == "a\ufffd"


def test_invalid_byte_tokens_neither_raise_nor_spoil_their_neighbours():
    token = {i: f"<0x{i:02X}>" for i in range(256)}
    backend = tokenizers_of.sentencepiece()
    ids = [backend.token_to_id(token[b]) for b in (0x41, 0xFF, 0x42, 0xE5, 0xA5, 0xBD)]
    assert _streamed(SENTENCEPIECE, SENTENCEPIECE.encode("he"), ids) == "A\ufffdB好"


def test_the_first_word_keeps_its_space_only_behind_a_prompt():
    he = SENTENCEPIECE.encode("he")
    assert _streamed(SENTENCEPIECE, [], he) == "he"
    assert _streamed(SENTENCEPIECE, he, he) == " he"
    begin = tokenizers_of.sentencepiece().token_to_id("<s>")
    assert _streamed(SENTENCEPIECE, [begin], he) == "he"


def test_special_tokens_are_shown_only_if_asked_for():
    end = tokenizers_of.byte_level().token_to_id("<|end|>")
    ids = [*BYTE_LEVEL.encode("he"), end]
    assert _streamed(BYTE_LEVEL, [], ids) == "he"
    assert _streamed(BYTE_LEVEL, [], ids, skip_special_tokens=False) == "he<|end|>"


@pytest.mark.parametrize("token_id", [10**6, -1])
def test_an_id_without_a_token_stands_for_nothing(token_id):
    assert _streamed(BYTE_LEVEL, [], [token_id]) == ""
    assert BYTE_LEVEL.token_bytes(token_id) == b""


def test_token_bytes_are_exact():
    backend = tokenizers_of.sentencepiece()
    assert SENTENCEPIECE.token_bytes(backend.token_to_id("▁wo")) == b" wo"
    assert SENTENCEPIECE.token_bytes(backend.token_to_id("<0xE5>")) == b"\xe5"
    assert b"".join(map(BYTE_LEVEL.token_bytes, BYTE_LEVEL.encode("w好😀"))) == "w好😀".encode()


def test_a_tokenizer_without_a_decoder_is_decoded_by_asking():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = Tokenizer(backend)
    assert isinstance(tokenizer.stream([]), PrefixStream)
    assert _streamed(tokenizer, [], [0, 1, 0]) == "a b a"


def test_a_strip_of_something_else_is_not_taken_for_a_space():
    backend = tokenizers_of.sentencepiece()
    backend.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Fuse(), tokenizers.decoders.Strip("h", 1, 0)]
    )
    assert isinstance(Tokenizer(backend).stream([]), PrefixStream)
    assert isinstance(SENTENCEPIECE.stream([]), ByteStream)
