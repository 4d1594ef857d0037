"""What a model's folder says about text: its tokenizer, its special tokens, its chat template.

Owns the loaded tokenizer. Needs no torch; transformers only, in a process of its own, where a model
comes without `tokenizer.json`. The command line loads it, `intake.py` encodes, `choice.py` decodes.
"""

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from penstock.core.errors import BadRequest, StartupFailed
from penstock.server.chat_template import ChatTemplate, Message
from penstock.server.detokenize import (
    ByteStream,
    PrefixStream,
    TextStream,
    TokenBytes,
    VisibleBytes,
)

logger = logging.getLogger(__name__)

_NAMED_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
_VOCABULARY_NAMES = ("tokenizer", "vocab", "merges", "piece", "tekken", "tiktoken")
_CONVERT_TIMEOUT_S = 300
_CONVERT = """
import sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], local_files_only=True)
tokenizer.backend_tokenizer.save(sys.argv[2])
"""


class Tokenizer:
    """Text to token ids and back. Every call may be made from any thread."""

    def __init__(self, backend: tokenizers.Tokenizer, template: ChatTemplate | None = None) -> None:
        self._backend = backend
        self._template = template
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._bytes = TokenBytes(backend)
        self._visible = VisibleBytes(self._bytes, self.special_ids)
        # A normalizer may drop characters, and an unknown token may stand for any number of them.
        longest = max(map(len, backend.get_vocab(with_added_tokens=True)))
        is_known = self._bytes.is_byte_level and backend.normalizer is None
        self.max_token_chars = longest if is_known else None
        """Most characters of a text that one token can stand for; None where nothing is known."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens that have a text; a model's embedding may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`, with BOS and EOS where the model wants them."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Return the token ids of each text."""
        return [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of a whole sequence."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes one token stands for; they need not be whole characters."""
        return self._bytes[token_id]

    def stream(self, prompt: Sequence[int], *, skip_special_tokens: bool = True) -> TextStream:
        """Return a decoder for what follows `prompt`."""
        if not self._bytes.is_exact:
            return PrefixStream(
                lambda ids: self.decode(ids, skip_special_tokens=skip_special_tokens), prompt
            )
        table = self._visible if skip_special_tokens else self._bytes
        is_start = self._bytes.has_other_start and not any(map(table.__getitem__, prompt))
        return ByteStream(table, self._bytes.at_start if is_start else None)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        options: Mapping[str, object] | None = None,
    ) -> str:
        """Return the conversation as the text the model was trained on; encode it without adding
        special tokens.

        Raises: `BadRequest` when the model has no template or its template refuses.
        """
        if self._template is None:
            raise BadRequest("this model has no chat template: use /v1/completions", "messages")
        return self._template.render(
            messages, add_generation_prompt=add_generation_prompt, options=options
        )


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load the tokenizer of a model as transformers' `AutoTokenizer` would.

    Where there is a `tokenizer.json`, its post-processor alone says what `add_special_tokens` adds.

    Raises: `StartupFailed` when the folder has none or the chat template does not parse.
    """
    folder = Path(folder)
    config = _read_json(folder / "tokenizer_config.json")
    named = _named_tokens(
        config | _missing_from(config, _read_json(folder / "special_tokens_map.json"))
    )
    if (folder / "tokenizer.json").is_file():
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        _add_tokens(backend, config, named)
    else:
        backend = _convert(folder)
    backend.no_truncation()
    backend.no_padding()
    source = _template_source(folder, config)
    return Tokenizer(backend, ChatTemplate(source, named) if source is not None else None)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StartupFailed(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise StartupFailed(f"{path} is not a JSON object")
    return content


def _missing_from(config: Mapping[str, Any], legacy: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in legacy.items() if config.get(name) is None}


def _content(token: Any) -> str:  # noqa: ANN401  a string, or an object with `content`
    return str(token["content"] if isinstance(token, dict) else token)


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    return {name: _content(config[name]) for name in _NAMED_TOKENS if config.get(name) is not None}


def _add_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]
) -> None:
    """Add what only `tokenizer_config.json` knows; special tokens must be known as such."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    declared = config.get("added_tokens_decoder") or {}
    for _, fields in sorted((int(token_id), fields) for token_id, fields in declared.items()):
        if fields["content"] not in known:
            backend.add_tokens([tokenizers.AddedToken(**_added_token_fields(fields))])
    added = backend.get_added_tokens_decoder().values()
    special = {token.content for token in added if token.special}
    wanted = [*named.values(), *map(_content, _extra_tokens(config))]
    backend.add_special_tokens(
        [
            tokenizers.AddedToken(content, special=True, normalized=False)
            for content in dict.fromkeys(wanted)
            if content not in special
        ]
    )


def _added_token_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {name: fields[name] for name in names if name in fields}


def _extra_tokens(config: Mapping[str, Any]) -> Iterator[Any]:
    for name in ("additional_special_tokens", "extra_special_tokens"):
        extra = config.get(name) or []
        yield from extra.values() if isinstance(extra, dict) else extra


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        # Several named templates; the one for tools is of no use here.
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _convert(folder: Path) -> tokenizers.Tokenizer:
    """Have transformers convert another format, in a process that then goes away with torch."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if not any(word in name for name in names for word in _VOCABULARY_NAMES):
        raise StartupFailed(f"{folder} has no usable tokenizer: no file of it is one")
    logger.warning(
        "%s has no tokenizer.json: converting its tokenizer with transformers, which takes seconds "
        "at every start; `AutoTokenizer.from_pretrained(...).save_pretrained(...)` writes one",
        folder,
    )
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "tokenizer.json"
        command = [sys.executable, "-c", _CONVERT, str(folder), str(target)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_CONVERT_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise StartupFailed(f"converting the tokenizer of {folder} timed out") from error
        if done.returncode != 0 or not target.is_file():
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise StartupFailed(f"{folder} has no usable tokenizer: {reason}")
        return tokenizers.Tokenizer.from_file(str(target))
