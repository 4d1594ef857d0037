"""The check sees what it has to see, and leaves the model as it was."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import pytest
import torch

from penstock.engine.architectures import ARCHITECTURES
from penstock.engine.kernels.reference import ReferenceKernels
from penstock.engine.lift import lift
from penstock.engine.model import Forward, layout_of
from penstock.engine.self_check import TOLERANCE, make_probes, measure_error, reference_logits
from tests.engine.tiny_models import VOCAB_SIZE, make_model


@dataclass(frozen=True)
class Tampered:
    """A forward whose logits are changed on the way out."""

    inner: Forward
    change: Callable[[object, torch.Tensor], torch.Tensor]

    @property
    def attention(self) -> Sequence[object]:
        return self.inner.attention

    def with_windows_below(self, limit: int) -> "Tampered":
        return Tampered(self.inner.with_windows_below(limit), self.change)

    def bind(self, *arguments: object) -> Callable[[object], torch.Tensor]:
        run = self.inner.bind(*arguments)
        return lambda batch: self.change(batch, run(batch))


def error_of(dtype: torch.dtype, change: Callable[..., torch.Tensor], **values: object) -> float:
    model = make_model("ministral", dtype, **values)
    probes = make_probes(VOCAB_SIZE, 256, is_rope_by_length=False)
    reference = reference_logits(model, probes, 256)
    forward = Tampered(lift(model, ARCHITECTURES["ministral"], 256), change)
    layout = layout_of(forward, "check", str(dtype).removeprefix("torch."), 32)
    return measure_error(forward, ReferenceKernels(), layout, probes, reference)


def nudge_last_decode(batch: object, logits: torch.Tensor) -> torch.Tensor:
    logits = logits.clone()
    if batch.kv_len.tolist()[-1] == 13:
        logits[-1, 0] += 0.1
    return logits


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_an_honest_forward_passes(dtype: torch.dtype) -> None:
    assert error_of(dtype, lambda _, logits: logits) < TOLERANCE[dtype] / 3


def test_one_wrong_row_in_float32_fails() -> None:
    assert error_of(torch.float32, nudge_last_decode) > TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_wrong_logits_fail(dtype: torch.dtype) -> None:
    assert error_of(dtype, lambda _, logits: logits * 1.3) > TOLERANCE[dtype]
    assert error_of(dtype, lambda _, logits: logits.roll(1, -1)) > TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_nan_fails(dtype: torch.dtype) -> None:
    assert error_of(dtype, lambda _, logits: logits * torch.nan) == inf


def test_probes_cover_both_ends_of_the_context() -> None:
    first, last = make_probes(VOCAB_SIZE, 256, is_rope_by_length=False)
    assert first.positions[0] == 0
    assert last.positions[-1] == 255
    both = make_probes(VOCAB_SIZE, 256, is_rope_by_length=True)
    assert [int(probe.positions[-1]) for probe in both] == [255, 255]


def test_windows_are_short_only_while_it_lasts() -> None:
    model = make_model("ministral")
    probes = make_probes(VOCAB_SIZE, 256, is_rope_by_length=False)
    short = reference_logits(model, probes, 256)[0]
    assert model.config.sliding_window == 10
    with torch.inference_mode():
        plain = model(probes[0].token_ids[None]).logits[0]
    # Eight tokens see the same with either window; those behind them do not.
    torch.testing.assert_close(short[:8], plain[:8])
    assert not torch.allclose(short[12:], plain[12:], atol=1e-3)
