"""Token ids to text, one token at a time, so that a character never leaves in two halves.

Owns the bytes that each token stands for and the decoder state of one sequence. Knows no request
and no stop string. `tokenizer.py` makes the streams, `choice.py` feeds them.

For byte-level and sentencepiece decoders a token is a fixed byte string once something precedes
it, so a dictionary and an incremental UTF-8 decoder do: exact for any bytes and 0.3 us a token.
(`tokenizers.decoders.DecodeStream` raises on byte-fallback tokens that form no valid character.)
Every other decoder is asked twice a token, for the text before and the text after.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PER_TOKEN_STEPS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
_CONTEXT_TOKENS = 6


class TextStream(Protocol):
    """The text of one sequence, as far as it is certain."""

    def push(self, token_id: int) -> str:
        """Take one token; return the text that is complete with it, maybe none."""

    def flush(self) -> str:
        """Return what is left at the end: a replacement character for an unfinished one."""


class TokenBytes(dict[int, bytes]):
    """The bytes of each token as it reads behind another one, worked out when first asked for.

    An id that the tokenizer does not have stands for nothing.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        super().__init__()
        self._backend = backend
        steps = _decoder_steps(backend)
        types = {step["type"] for step in steps}
        self.is_byte_level = types == {"ByteLevel"}
        self._has_byte_tokens = "ByteFallback" in types
        self._byte_of = _byte_of_character()
        self._anchor = None if self.is_byte_level else _find_anchor(backend)
        self.is_exact = self.is_byte_level or (self._anchor is not None and _is_per_token(steps))
        """Whether a token's bytes depend on no neighbour, save for a space at the very start."""
        self.has_other_start = not self.is_byte_level and _drops_first_space(backend)
        """Whether a token reads differently at the very start of a text: see `at_start`."""

    def __missing__(self, token_id: int) -> bytes:
        found = self[token_id] = self._work_out(token_id)
        return found

    def at_start(self, token_id: int) -> bytes:
        """Return the bytes of a token that begins a text."""
        found = self[token_id]
        is_text = not self._has_byte_tokens or not self._is_byte_token(token_id)
        return self._decode([token_id]).encode() if found and is_text else found

    def _is_byte_token(self, token_id: int) -> bool:
        return _BYTE_TOKEN.fullmatch(self._backend.id_to_token(token_id) or "") is not None

    def _work_out(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        if self.is_byte_level:
            values = [self._byte_of.get(character) for character in token]
            # An added token with a character outside the alphabet is written as it is.
            return token.encode() if None in values else bytes(v for v in values if v is not None)
        if self._has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if self._anchor is None:
            return self._decode([token_id]).encode()
        # Behind a letter, so that a space at the start is not lost.
        alone = self._decode([self._anchor])
        return self._decode([self._anchor, token_id])[len(alone) :].encode()

    def _decode(self, token_ids: list[int]) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=False)


class VisibleBytes(dict[int, bytes]):
    """`TokenBytes` with special tokens standing for nothing."""

    def __init__(self, token_bytes: TokenBytes, special_ids: Iterable[int]) -> None:
        super().__init__(dict.fromkeys(special_ids, b""))
        self._token_bytes = token_bytes

    def __missing__(self, token_id: int) -> bytes:
        found = self[token_id] = self._token_bytes[token_id]
        return found


class ByteStream:
    """The text of a sequence whose tokens are fixed byte strings.

    `at_start` is for the first token that stands for anything, where that one reads differently.
    """

    __slots__ = ("_at_start", "_bytes_of", "_decode")

    def __init__(
        self, bytes_of: dict[int, bytes], at_start: Callable[[int], bytes] | None = None
    ) -> None:
        self._bytes_of = bytes_of
        self._at_start = at_start
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_id: int) -> str:
        """Take one token; return the text that is complete with it, maybe none."""
        piece = self._bytes_of[token_id]
        if self._at_start is not None and piece:
            piece = self._at_start(token_id)
            self._at_start = None
        return self._decode(piece)

    def flush(self) -> str:
        """Return what is left at the end: a replacement character for an unfinished one."""
        return self._decode(b"", True)


class PrefixStream:
    """The text of a sequence under any decoder: what is new is what decoding grew by.

    The window is the tokens of the last growth and those since, so the cost does not depend on the
    length of the sequence. `decode` takes token ids, `context` is the end of the prompt.
    """

    __slots__ = ("_decode", "_ids", "_known", "_text")

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(context[-_CONTEXT_TOKENS:])
        self._known = len(self._ids)
        self._text = decode(self._ids)

    def push(self, token_id: int) -> str:
        """Take one token; return the text that is complete with it, maybe none."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if len(text) <= len(self._text) or text.endswith("\ufffd"):
            return ""
        new = text[len(self._text) :]
        self._ids = self._ids[self._known :]
        self._known = len(self._ids)
        self._text = self._decode(self._ids)
        return new

    def flush(self) -> str:
        """Return what is left at the end: a replacement character for an unfinished one."""
        return self._decode(self._ids)[len(self._text) :]


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, object]]:
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    assert isinstance(steps, list)
    return steps


def _is_per_token(steps: list[dict[str, object]]) -> bool:
    """Tell whether a decoder maps token by token, save for one space at the start of the text."""
    types = [step["type"] for step in steps]
    if not types or not _PER_TOKEN_STEPS.issuperset(types):
        return False
    fused = types.index("Fuse") if "Fuse" in types else len(types)
    if "Replace" in types[fused:]:
        return False
    strips = [step for step in steps if step["type"] == "Strip"]
    return all((s["content"], s["start"], s["stop"]) == (" ", 1, 0) for s in strips)


def _find_anchor(backend: tokenizers.Tokenizer) -> int | None:
    """Return a token that reads as a plain letter, to put before others."""
    for letter in ("a", "e", "A", "1"):
        token_id = backend.token_to_id(letter)
        if token_id is not None and backend.decode([token_id], skip_special_tokens=False) == letter:
            return token_id
    return None


def _drops_first_space(backend: tokenizers.Tokenizer) -> bool:
    token_id = backend.token_to_id("▁")
    return token_id is not None and backend.decode([token_id], skip_special_tokens=False) == ""


def _byte_of_character() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Source: GPT-2's `bytes_to_unicode`.
    """
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    table = {chr(byte): byte for byte in shown}
    return table | {chr(256 + index): byte for index, byte in enumerate(hidden)}
