"""Codecs judged on the built-in model: the good ones are admitted, the coarse one is refused."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from penstock.core.config import EngineConfig
from penstock.engine.loading import load_model
from penstock.kv.quality import KvQuality, parse_quality
from penstock.runtime import codecs
from penstock.runtime.codecs import PROBE, admit_codecs, round_trip_of

FOLDER = Path(__file__).parents[2] / "penstock" / "builtin" / "penstock-tiny"
BLOCK_SIZE = 32


@pytest.fixture(scope="module")
def model():
    return load_model(EngineConfig(model=str(FOLDER), dtype="bfloat16"), lambda *_: None)


@pytest.fixture(scope="module")
def texts():
    text = PROBE.read_text(encoding="utf-8")
    return [Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode(text).ids]


def test_the_probe_is_long_enough_and_short_enough(texts):
    assert 500 < len(texts[0]) < 2000


def test_codecs_are_measured_and_the_coarse_one_is_refused(model, texts):
    names = ["lossless", "int8", "int4", "sparse"]
    quality = parse_quality("0.6%,95%")
    admission = admit_codecs(model, names, quality, texts, block_size=BLOCK_SIZE)
    assert admission.admitted == ("lossless", "int8", "int4")
    assert list(admission.refused) == ["sparse"]
    assert "--kv-quality" in admission.refused["sparse"]
    assert admission.measured["lossless"] is None
    int8, int4 = admission.measured["int8"], admission.measured["int4"]
    assert abs(int8.loss_increase) < 0.001
    assert abs(int4.loss_increase) < 0.01
    assert int4.greedy_agreement < int8.greedy_agreement <= 1


def test_an_exact_budget_measures_nothing(model, texts, monkeypatch):
    monkeypatch.setattr(codecs, "read_texts", None)
    admission = admit_codecs(model, ["lossless", "int8"], KvQuality(), texts, block_size=BLOCK_SIZE)
    assert admission.admitted == ("lossless",)
    assert admission.refused == {"int8": "int8 is lossy, and --kv-quality is exact"}


def test_a_round_trip_changes_its_blocks_alone(model):
    layout = model.layout(BLOCK_SIZE)
    pool = np.random.default_rng(0).standard_normal((3, layout.block_bytes[0] // 4))
    blocks = pool.astype(np.float32).view(np.uint32) & 0xFFFF0000
    blocks = np.ascontiguousarray(blocks >> 16 | blocks).view(np.uint8)
    before = blocks.copy()
    round_trip_of("lossless", layout)(0, blocks[1:2])
    assert (blocks == before).all()
    round_trip_of("int8", layout)(0, blocks[1:2])
    assert (blocks[[0, 2]] == before[[0, 2]]).all()
    assert (blocks[1] != before[1]).any()


def test_an_unknown_codec_is_refused(model, texts):
    with pytest.raises(ValueError, match="no codec is called 'zip'"):
        admit_codecs(model, ["zip"], KvQuality(0.01), texts, block_size=BLOCK_SIZE)
