"""Experts by grouped products are the experts of the loop, and are known to be capturable."""

import pytest
import torch

from penstock.engine.architectures import ARCHITECTURES
from penstock.engine.experts import EAGER, GROUPED, choose_experts
from penstock.engine.graphs import is_capturable
from penstock.engine.lift import lift
from tests.engine.tiny_models import make_model, tokens


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "glm4_moe"])
def test_grouped_experts_are_the_loops(name):
    model = make_model(name)
    ids = torch.tensor([tokens(37)])
    with torch.inference_mode():
        model.set_experts_implementation(EAGER)
        expected = model(ids).logits
        assert choose_experts(model) == GROUPED
        found = model(ids).logits
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1).max()
    assert ((found - expected).norm(dim=-1) / spread).max() < 1e-5
    assert is_capturable(lift(model, ARCHITECTURES[name], 256))


def test_a_model_without_the_choice_keeps_its_own_code(monkeypatch):
    model = make_model("mixtral")

    def refuse(_implementation):
        raise ValueError("there is none")

    monkeypatch.setattr(model, "set_experts_implementation", refuse)
    assert choose_experts(model) == EAGER
    assert not is_capturable(lift(model, ARCHITECTURES["mixtral"], 256))


def test_a_dense_decoder_can_be_captured():
    assert is_capturable(lift(make_model("llama"), ARCHITECTURES["llama"], 256))
