"""Loading a model's folder against transformers' `AutoTokenizer`."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import penstock
from penstock.core.errors import BadRequest, StartupFailed
from penstock.server.tokenizer import load_tokenizer
from tests.server import tokenizers_of

BUILTIN = Path(penstock.__file__).parent / "builtin" / "penstock-tiny"
TEXTS = [
    "def f(x):\n    return x + 1\n",
    "héllo wörld 好 😀\t  three   spaces\r\n",
    "<|user|>hi<|end|><|endoftext|>",
    " leading and trailing ",
    "<s>hello</s> he h w",
    "",
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi <b> & 好"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "again"},
]


def _write_folder(folder: Path, backend, config: dict, **files: str) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


@pytest.fixture(
    scope="module", params=["builtin", "bos and eos", "late tokens", "template file", "named"]
)
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    match request.param:
        case "builtin":
            return BUILTIN
        case "bos and eos":
            backend = tokenizers_of.sentencepiece()
            backend.post_processor = TemplateProcessing(
                single="<s> $A", pair=None, special_tokens=[("<s>", 1)]
            )
            config = {
                "bos_token": "<s>",
                "eos_token": {"__type": "AddedToken", "content": "</s>"},
                "add_bos_token": False,
                "add_eos_token": True,
                "chat_template": template,
            }
            return _write_folder(folder, backend, config)
        case "late tokens":
            config = {
                "bos_token": "<|begin|>",
                "eos_token": "<|end|>",
                "additional_special_tokens": ["<|user|>"],
                "added_tokens_decoder": {
                    "263": {"content": "<|begin|>", "special": True, "normalized": False},
                    "264": {"content": "<think>", "special": False, "normalized": False},
                },
                "chat_template": template,
            }
            return _write_folder(folder, tokenizers_of.byte_level(), config)
        case "template file":
            config = {"eos_token": "<|end|>", "bos_token": "<|end|>"}
            backend = tokenizers_of.byte_level()
            return _write_folder(folder, backend, config, chat_template__jinja=template)
        case "named":
            templates = [
                {"name": "tool_use", "template": "wrong"},
                {"name": "default", "template": template},
            ]
            config = {"bos_token": "<|end|>", "chat_template": templates}
            return _write_folder(folder, tokenizers_of.byte_level(), config)
    raise AssertionError(request.param)


@pytest.fixture(scope="module")
def pair(folder):
    return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("is_special", [True, False])
def test_encodes_as_transformers_does(pair, is_special):
    ours, theirs = pair
    for text in TEXTS:
        expected = theirs(text, add_special_tokens=is_special)["input_ids"]
        assert ours.encode(text, add_special_tokens=is_special) == expected
    batch = theirs(TEXTS, add_special_tokens=is_special)["input_ids"]
    assert ours.encode_batch(TEXTS, add_special_tokens=is_special) == batch


@pytest.mark.parametrize("skips", [True, False])
def test_decodes_as_transformers_does(pair, skips):
    ours, theirs = pair
    for text in TEXTS:
        ids = ours.encode(text)
        assert ours.decode(ids, skip_special_tokens=skips) == theirs.decode(
            ids, skip_special_tokens=skips
        )


def test_special_tokens_and_size_are_the_same(pair):
    ours, theirs = pair
    assert ours.special_ids >= set(theirs.all_special_ids)
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("prompt", [True, False])
def test_writes_chats_as_transformers_does(pair, prompt):
    ours, theirs = pair
    text = ours.apply_chat_template(CHAT, add_generation_prompt=prompt)
    assert text == theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
    ids = theirs.apply_chat_template(CHAT, add_generation_prompt=prompt, return_dict=False)
    assert ours.encode(text, add_special_tokens=False) == ids


def test_the_built_in_template_refuses_unknown_roles():
    with pytest.raises(BadRequest, match="unknown role"):
        load_tokenizer(BUILTIN).apply_chat_template([{"role": "tool", "content": "x"}])


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    backend = tokenizers_of.byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    tokenizer = load_tokenizer(_write_folder(tmp_path, backend, {}))
    assert len(tokenizer.encode("abcdef")) == 6
    assert len(tokenizer.encode("a")) == 1


def test_the_longest_token_is_known_only_where_nothing_is_lost(tmp_path):
    assert load_tokenizer(BUILTIN).max_token_chars == 40
    folder = _write_folder(tmp_path, tokenizers_of.wordpiece(), {})
    assert load_tokenizer(folder).max_token_chars is None, "[UNK] stands for any word"


def test_a_model_without_a_template_refuses_chats(tmp_path):
    tokenizer = load_tokenizer(_write_folder(tmp_path, tokenizers_of.byte_level(), {}))
    with pytest.raises(BadRequest, match="/v1/completions"):
        tokenizer.apply_chat_template(CHAT)


def test_legacy_files_name_special_tokens(tmp_path):
    legacy = json.dumps({"bos_token": {"content": "<|end|>"}})
    files = {"special_tokens_map__json": legacy, "chat_template__jinja": "{{ bos_token }}"}
    tokenizer = load_tokenizer(_write_folder(tmp_path, tokenizers_of.byte_level(), {}, **files))
    assert tokenizer.apply_chat_template(CHAT) == "<|end|>"


def test_another_format_is_converted_aloud(tmp_path, caplog):
    vocab = {c: i for i, c in enumerate(["<|endoftext|>", *"abcdeĠ", "ab"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(tmp_path)
    assert "no tokenizer.json" in caplog.text
    assert tokenizer.encode("abc ab") == [vocab[t] for t in ("ab", "c", "Ġ", "ab")]


def test_a_folder_without_a_tokenizer_stops_the_start(tmp_path):
    with pytest.raises(StartupFailed, match="no usable tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_configuration_stops_the_start(tmp_path, text):
    _write_folder(tmp_path, tokenizers_of.byte_level(), {})
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(StartupFailed, match="tokenizer_config"):
        load_tokenizer(tmp_path)


def test_serving_imports_neither_torch_nor_transformers():
    script = (
        "import sys\n"
        "from penstock.server.app import create_app\n"
        "from penstock.server.tokenizer import load_tokenizer\n"
        f"load_tokenizer({str(BUILTIN)!r}).encode('x')\n"
        "assert not {'torch', 'transformers', 'numpy.f2py'} & set(sys.modules)\n"
    )
    root = Path(penstock.__file__).parent.parent
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root, timeout=60)
