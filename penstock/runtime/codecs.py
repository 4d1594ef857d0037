"""Which KV codecs a model may use: each is measured on a short text, and judged by the budget.

Composes the measure (`penstock/engine/kv_quality.py`), the codecs and the verdict
(`penstock/kv/quality.py`). `runtime/tier_codecs.py` asks, after the model is loaded and before
workers are forked; they then encode with what was admitted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from penstock.codec.codec import CODECS, Codec, make_codec
from penstock.engine.kv_quality import Bytes2D, Reading, RoundTrip, compare, read_texts
from penstock.kv.quality import KvQuality, Measured, exact_refusal, refusal

if TYPE_CHECKING:
    from penstock.core.block import KVLayout
    from penstock.engine.model import LoadedModel

PROBE: Final = Path(__file__).with_name("probe.txt")
"""A text of our own, prose and code, so that no model has been trained on it."""


@dataclass(frozen=True, slots=True)
class Admission:
    """What was found: per codec its measure, None for a lossless one, and why some are refused."""

    measured: dict[str, Measured | None]
    refused: dict[str, str]

    @property
    def admitted(self) -> tuple[str, ...]:
        """Names of the codecs that may be used."""
        return tuple(name for name in self.measured if name not in self.refused)


def admit_codecs(
    model: LoadedModel,
    names: Iterable[str],
    quality: KvQuality,
    texts: Sequence[Sequence[int]],
    *,
    block_size: int,
    exact: Reading | None = None,
) -> Admission:
    """Measure codecs on a model and judge them; nothing is measured where the budget is exact.

    `texts` are token ids of at least two blocks each, in practice `PROBE` by the model's own
    tokeniser. Takes one reading of the texts, unless the `exact` one is there, and one more for
    each lossy codec.
    Raises: `ValueError` for a codec that does not exist, or blocks that codecs are not made for.
    """
    layout = model.layout(block_size)
    names = list(names)
    round_trips = {name: round_trip_of(name, layout) for name in names}
    lossy = [name for name in names if not CODECS[name].is_lossless]
    measured: dict[str, Measured | None] = dict.fromkeys(names)
    if quality.is_exact:
        return Admission(measured, {name: exact_refusal(name) for name in lossy})
    assert all(len(text) > 2 * block_size for text in texts), [len(text) for text in texts]
    if lossy and exact is None:
        exact = read_texts(model, texts, block_size=block_size)
    for name in lossy:
        assert exact is not None, name
        found = compare(exact, read_texts(model, texts, round_trips[name], block_size=block_size))
        measured[name] = Measured(found.loss_increase, found.greedy_agreement, found.loss_error)
    verdicts = {name: refusal(quality, name, measured[name]) for name in names}
    return Admission(measured, {n: verdict for n, verdict in verdicts.items() if verdict})


def round_trip_of(name: str, layout: KVLayout) -> RoundTrip:
    """Return what takes blocks of a pool through a codec, in place.

    Raises: `ValueError` for a codec that does not exist, or blocks that it is not made for.
    """
    codecs = [make_codec(name, layout, group) for group in range(len(layout.groups))]

    def round_trip(group: int, blocks: Bytes2D) -> None:
        _through(codecs[group], blocks)

    return round_trip


def _through(codec: Codec, blocks: Bytes2D) -> None:
    encoded = np.empty((len(blocks), codec.encoded_bytes), np.uint8)
    codec.encode(blocks, range(len(blocks)), encoded)
    codec.decode(encoded, blocks, range(len(blocks)))
