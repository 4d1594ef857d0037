"""Held-out loss with KV through a codec: exact without one, worse the more is lost."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from penstock.core.config import EngineConfig
from penstock.engine.kv_quality import Part, Reading, compare, read_texts
from penstock.engine.loading import load_model
from tests.engine.tiny_models import save_model

FOLDER = Path(__file__).parents[2] / "penstock" / "builtin" / "penstock-tiny"
BLOCK_SIZE = 16
TEXT = '''\
class Counter:
    """Counts how often something was seen."""

    def __init__(self, items=()):
        self._counts = {}
        for item in items:
            self.add(item)

    def add(self, item, number=1):
        self._counts[item] = self._counts.get(item, 0) + number

    def most(self, default=None):
        if not self._counts:
            return default
        return max(self._counts, key=self._counts.get)
'''


@pytest.fixture(scope="module")
def model():
    return load_model(EngineConfig(model=str(FOLDER), dtype="float32"), lambda *_: None)


@pytest.fixture(scope="module")
def text():
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode("<|endoftext|>" + TEXT).ids


def add_noise(size, _group, blocks):
    numbers = blocks.view(np.float32)
    numbers += size * np.random.default_rng(0).standard_normal(numbers.shape).astype(np.float32)


def test_without_a_codec_it_is_the_models_own_loss(model, text):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    ids = torch.tensor(text)
    with torch.inference_mode():
        logits = theirs(ids[None, :-1]).logits[0]
    wanted = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").numpy()
    reading = read_texts(model, [text, text[:40]], block_size=BLOCK_SIZE)
    assert len(reading.nats) == len(text) - 1 + 39
    np.testing.assert_allclose(reading.nats[: len(wanted)], wanted, atol=1e-3)
    assert (reading.greedy[: len(wanted)] == logits.argmax(-1).numpy()).mean() > 0.99
    # A text knows nothing of the one before it.
    np.testing.assert_allclose(reading.nats[len(wanted) :], wanted[:39], atol=1e-3)


def test_each_full_block_goes_through_the_codec_once(model, text):
    seen = []

    def round_trip(group, blocks):
        seen.append((group, blocks.shape))
        assert blocks.any()

    exact = read_texts(model, [text], block_size=BLOCK_SIZE)
    coded = read_texts(model, [text], round_trip, block_size=BLOCK_SIZE)
    block_bytes = model.layout(BLOCK_SIZE).block_bytes[0]
    assert seen == [(0, (1, block_bytes))] * ((len(text) - 1) // BLOCK_SIZE)
    quality = compare(exact, coded)
    assert (quality.loss_increase, quality.greedy_agreement) == (0.0, 1.0)


def test_the_more_is_lost_the_worse_it_gets(model, text):
    read = partial(read_texts, model, [text], block_size=BLOCK_SIZE)
    exact = read()
    little, much = (compare(exact, read(partial(add_noise, size))) for size in (0.02, 2.0))
    assert abs(little.loss_increase) < 0.02 < 0.1 < much.loss_increase
    assert little.greedy_agreement > 0.95 > much.greedy_agreement
    # The first block is computed without any past.
    coded = read(partial(add_noise, 2.0))
    np.testing.assert_array_equal(coded.nats[:BLOCK_SIZE], exact.nats[:BLOCK_SIZE])


def test_every_group_of_layers_goes_through(tmp_path):
    save_model(tmp_path, "gemma3_text")
    config = EngineConfig(model=str(tmp_path), dtype="float32")
    windowed = load_model(config, lambda *_: None)
    groups = set()
    text = list(range(5, 40))
    exact = read_texts(windowed, [text], block_size=BLOCK_SIZE)
    coded = read_texts(windowed, [text], lambda group, _: groups.add(group), block_size=BLOCK_SIZE)
    assert groups == {0, 1}
    np.testing.assert_array_equal(exact.nats, coded.nats)


def test_readings_of_the_same_text_are_compared():
    exact = Reading(np.array([1.0, 3.0]), np.array([4, 5]))
    coded = Reading(np.array([1.0, 3.2]), np.array([4, 6]))
    quality = compare(exact, coded)
    assert quality.loss_increase == pytest.approx(0.05)
    assert quality.greedy_agreement == 0.5


def test_a_window_that_holds_all_changes_nothing_and_a_small_one_hides(model):
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    texts = [tokenizer.encode(TEXT).ids]
    exact = read_texts(model, texts, block_size=BLOCK_SIZE)
    wide = read_texts(model, texts, block_size=BLOCK_SIZE, part=Part(window=1000))
    assert (wide.nats == exact.nats).all()
    narrow = read_texts(model, texts, block_size=BLOCK_SIZE, part=Part(window=BLOCK_SIZE))
    # The first three blocks see all there is before them.
    seen = 2 * BLOCK_SIZE
    np.testing.assert_allclose(narrow.nats[:seen], exact.nats[:seen], rtol=1e-4, atol=1e-4)
    assert (narrow.nats[seen:] != exact.nats[seen:]).any()


def test_a_selection_costs_less_than_a_window_of_its_size(model):
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    ids = tokenizer.encode(TEXT).ids
    # What the prompt ends with stands at its beginning too, and nowhere near its end.
    other = [int(token) for token in np.random.default_rng(2).integers(10, 4000, 256)]
    text, prompt_tokens = ids + other + ids, len(ids) + len(other) + 20
    prompt_tokens -= prompt_tokens % BLOCK_SIZE

    def read(**part: int) -> Reading:
        return read_texts(
            model, [text], block_size=BLOCK_SIZE, part=Part(prompt_tokens=prompt_tokens, **part)
        )

    exact = read()
    assert len(exact.nats) == len(text) - 1 - prompt_tokens
    whole = read_texts(model, [text], block_size=BLOCK_SIZE)
    np.testing.assert_array_equal(exact.nats, whole.nats[prompt_tokens:])
    np.testing.assert_array_equal(exact.nats, read(select=1000).nats)
    selected, windowed = (compare(exact, read(**{kind: 128})) for kind in ("select", "window"))
    assert selected.loss_increase != 0
    assert selected.loss < windowed.loss
