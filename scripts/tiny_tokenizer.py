"""Builds the tokenizer of `penstock-tiny` and states its special tokens and its chat template.

Owns the vocabulary and how a text is cut before byte pairs are merged. `train_tiny.py` calls it
once; afterwards only the folder it was written to counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, PAD, SYSTEM, USER, ASSISTANT, END = SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
VOCAB_SIZE = 4096

# Line ends, then indentation, are tokens of their own: a prompt may stop after `:`, after the line
# end or after the spaces and is cut in each case as it was in training.
CUTS = (
    r"[\r\n]+"
    r"|[ \t]{2,}"
    r"|[ .]?[\p{L}\p{M}_]+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{M}\p{N}_]+"
    r"|\s"
)

# `content` may also be a list of parts, as in the OpenAI API; the texts among them are joined.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('unknown role: ' + message['role']) -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>\\n' -}}"
    "{%- if message['content'] is string -%}"
    "{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}"
    "{{- part['text'] -}}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"
)


def build_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Learn a byte-level vocabulary of exactly `VOCAB_SIZE` tokens from `texts`.

    Any byte string is representable; decoding gives back the text. No token is added by itself.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CUTS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    return tokenizer


def render_chat(messages: Iterable[dict[str, str]]) -> str:
    """Write a finished conversation as the chat template writes it."""
    return "".join(f"<|{m['role']}|>\n{m['content']}{END}\n" for m in messages)


def write_tokenizer(tokenizer: Tokenizer, output: Path, context: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` with the chat template inside.

    The configuration is written by hand, in the form that transformers 4 and 5 both read.
    """
    tokenizer.save(str(output / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT, END],
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (output / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
