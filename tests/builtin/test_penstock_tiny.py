"""The built-in model is whole, small, loads offline and has learnt what its card claims.

The bounds leave room for another training run of the same length; an untrained model, a broken
tokenizer or weights of another vocabulary miss every one of them by far.
"""

import ast
import json
import math
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parents[2] / "penstock" / "builtin" / "penstock-tiny"
FOLDER_BYTES_MAX = 20_000_000
SPECIAL_TOKENS = ["<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
BITS_PER_BYTE_MAX = 1.1

# Written for this test, so no training run can have seen it.
HELD_OUT = '''\
class Shelf:
    """A shelf that holds a limited number of books."""

    def __init__(self, capacity=10):
        self.capacity = capacity
        self._books = []

    def __len__(self):
        return len(self._books)

    def add(self, title, author=None):
        """Put a book on the shelf and return its position.

        Raise ValueError if the shelf is full.
        """
        if len(self._books) >= self.capacity:
            raise ValueError("shelf is full: %r" % (title,))
        self._books.append((title, author))
        return len(self._books) - 1

    def find(self, title):
        for index, (name, author) in enumerate(self._books):
            if name == title:
                return index
        return -1

    def remove(self, title):
        index = self.find(title)
        if index < 0:
            raise KeyError(title)
        del self._books[index]
'''


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    # So small a model gains nothing from threads, and on a busy machine they wait for one another.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True).eval()
    torch.set_num_threads(threads)


def bits(model, tokenizer, text: str, context: str = "\n") -> float:
    """Measure what a byte of `text` costs behind `context`."""
    before = tokenizer(context).input_ids
    ids = torch.tensor([before + tokenizer(text).input_ids])
    with torch.inference_mode():
        logits = model(ids[:, :-1]).logits[0, len(before) - 1 :].float()
    nats = torch.nn.functional.cross_entropy(logits, ids[0, len(before) :], reduction="sum")
    return nats.item() / math.log(2) / len(text.encode())


def complete(model, tokenizer, prompt: str, tokens_max: int = 96) -> str:
    ids = tokenizer(prompt, return_tensors="pt")
    output = model.generate(
        ids.input_ids, attention_mask=ids.attention_mask, max_new_tokens=tokens_max
    )
    return tokenizer.decode(output[0, ids.input_ids.shape[1] :])


def first_function(text: str) -> str:
    """Cut a text behind its first function: at the first line that is not indented."""
    lines = text.splitlines()
    end = next((i for i, s in enumerate(lines) if i and s and not s.startswith(" ")), len(lines))
    return "\n".join(lines[:end])


def test_the_folder_is_small_and_complete():
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert {
        "README.md", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    } <= sizes.keys()  # fmt: skip
    assert sum(sizes.values()) <= FOLDER_BYTES_MAX


def test_the_configuration_is_a_small_llama(model):
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"]
    assert config["num_attention_heads"] > config["num_key_value_heads"] > 1
    assert config["head_dim"] % 16 == 0
    assert config["max_position_embeddings"] >= 2048
    assert model.dtype == torch.bfloat16
    assert 4e6 <= model.num_parameters() <= 10e6


def test_special_tokens_are_single_and_round_trip(tokenizer, model):
    assert len(tokenizer) == model.config.vocab_size
    for number, token in enumerate(SPECIAL_TOKENS):
        assert tokenizer(token).input_ids == [number]
        assert tokenizer.decode([number]) == token
    text = "def f():<|end|>\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == "def f():\n"
    assert model.generation_config.eos_token_id == [0, 5]


@given(st.text())
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("cut", ["def f(x):", "def f(x):\n", "def f(x):\n    "])
def test_a_prompt_may_stop_before_or_after_the_indentation(tokenizer, cut):
    whole = tokenizer("def f(x):\n    return x\n").input_ids
    part = tokenizer(cut).input_ids
    assert whole[: len(part)] == part


def test_the_chat_template_marks_the_turns(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello!"}]},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>\nBe brief.<|end|>\n<|user|>\nHello!<|end|>\n<|assistant|>\n"
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids
    assert ids == tokenizer(text).input_ids


def test_held_out_text_is_cheap(tokenizer, model):
    assert bits(model, tokenizer, HELD_OUT) < BITS_PER_BYTE_MAX


def test_held_out_text_is_cheap_at_the_end_of_a_long_context(tokenizer, model):
    before = Path(textwrap.__file__).read_text()
    context = tokenizer.decode(tokenizer(before).input_ids[:1700]) + "\n\n"
    assert bits(model, tokenizer, HELD_OUT, context) < BITS_PER_BYTE_MAX


PROMPTS = [
    "def get(self, key, default=None):\n",
    "def __iter__(self):\n",
    "def is_valid(value):\n",
    'def is_empty(self):\n    """Return True if the queue is empty."""\n',
    "def get_name(self):",
    "def __eq__(self, other):\n",
    "def set_name(self, name):\n",
    "def write(self, data):\n    ",
]


@pytest.mark.slow
def test_most_greedy_completions_are_functions(tokenizer, model):
    functions = [first_function(p + complete(model, tokenizer, p, tokens_max=64)) for p in PROMPTS]
    for function in functions:
        assert "\n    " in function, function
    good = [function for function in functions if _parses_but_for_its_end(function)]
    # A small model loses its thread now and then; an untrained one never finds it.
    assert len(good) >= 5, functions
    assert sum("return" in function for function in good) >= 3, functions


def _parses_but_for_its_end(function: str) -> bool:
    """The last line may be cut short by the limit of tokens."""
    return _parses(function) or _parses("\n".join(function.splitlines()[:-1]))


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


@pytest.mark.slow
def test_a_chat_is_answered_and_ended(tokenizer, model):
    question = "Complete this Python function:\n```python\ndef get_name(self):\n```"
    for content, start in ((question, "```python\n    "), ("Hello!", "Hello! I am penstock-tiny")):
        messages = [{"role": "user", "content": content}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        answer = complete(model, tokenizer, prompt, tokens_max=200)
        assert answer.startswith(start), answer
        assert answer.endswith("<|end|>"), answer
