"""The codec of each tier, decided where the model is loaded: asked for, or the quickest allowed.

What the model makes of each codec is measured (`runtime/codecs.py`), what the codec costs here
(`codec/price.py`, on KV that the model has just computed), what the tier gives
(`runtime/tier_rates.py`); `kv/tier_codec.py` weighs them. Without a codec that is asked for, and
with `--kv-quality exact`, nothing is measured and all tiers are raw.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from penstock.codec.codec import CODECS, Codec, make_codec
from penstock.codec.price import price
from penstock.core.errors import StartupFailed
from penstock.core.types import GIB
from penstock.engine.kv_quality import Bytes2D, Reading, read_texts
from penstock.kv.quality import KvQuality, Measured, charged_loss
from penstock.kv.tier_codec import TierWay, choose_tier_codecs
from penstock.kv.tiers import RAW, CodecSpec, Tier
from penstock.runtime.codecs import Admission, admit_codecs
from penstock.runtime.settings import AUTO, TierCodec, TierSettings
from penstock.runtime.tier_rates import tier_bytes_per_s

if TYPE_CHECKING:
    from penstock.engine.model import LoadedModel

CANDIDATES: Final = ("lossless", "fp8", "int8", "int4")
"""What auto chooses among, beside raw."""
SLACK: Final = 1.03
"""A lossless codec's slots are so much larger than the largest block of the probe."""
PAGE_BYTES: Final = 4096
SMALL_BYTES: Final = 64 * 1024
"""Slots of this size on are whole pages on disk, to be read past the cache."""
DISK_RATE: Final = GIB // 2
WIRE: Final = "wire"
"""The name of what is no tier: the way between hosts."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Chosen:
    """What was decided, per tier and for the wire, and lines for people about what was found."""

    codecs: tuple[TierCodec, ...] = ()
    wire: TierCodec | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class _Sample:
    """What the model made of the probe: how it read it, and blocks of its KV."""

    reading: Reading
    blocks: Bytes2D


def wanted_codecs(tiers: Sequence[TierSettings], quality: KvQuality) -> list[str]:
    """Return what each tier's codec is to be: a name, raw or auto."""
    return [tier.codec or (RAW if quality.is_exact else AUTO) for tier in tiers]


def tier_codecs(
    model: LoadedModel,
    tiers: Sequence[TierSettings],
    quality: KvQuality,
    probe: Callable[[], Sequence[int]],
    *,
    block_size: int,
    wire: str = RAW,
) -> Chosen:
    """Measure what may be used, and choose. `probe` gives the token ids of a text; `wire` is what
    is asked for between hosts, and is treated as one more place for blocks.

    Raises: `StartupFailed` when what was asked for is not to be had on this model: too lossy, with
    what was measured, or blocks that codecs are not made for.
    """
    if wire != RAW:
        places = (*tiers, TierSettings(name=WIRE, num_bytes=0, codec=wire))
        found = tier_codecs(model, places, quality, probe, block_size=block_size)
        return Chosen(found.codecs[:-1], found.codecs[-1], found.notes)
    wanted = wanted_codecs(tiers, quality)
    if all(name == RAW for name in wanted):
        return Chosen()
    names = [name for name in CODECS if name in wanted or (AUTO in wanted and name in CANDIDATES)]
    if quality.is_exact:
        names = [name for name in names if CODECS[name].is_lossless or name in wanted]
    text = probe()[: model.max_model_len]
    try:
        codecs = {name: make_codec(name, model.layout(block_size)) for name in names}
        _require_length(text, block_size)
        sample = _read(model, text, block_size)
        admission = admit_codecs(
            model, names, quality, [text], block_size=block_size, exact=sample.reading
        )
        _require_admitted(wanted, admission)
        specs = {name: _priced(codecs[name], sample, admission) for name in admission.admitted}
        raw = CodecSpec(name=RAW, block_bytes=model.layout(block_size).block_bytes[0])
        rates = [_rate(tier) for tier in tiers]
        ways = [
            TierWay(rate, tier.name != Tier.DISK.value)
            for tier, rate in zip(tiers, rates, strict=True)
        ]
        asked = [raw if n == RAW else specs[n] if n != AUTO else None for n in wanted]
        chosen = choose_tier_codecs(ways, asked, [raw, *specs.values()])
    except ValueError as error:
        flags = ("--handoff-codec" if tier.name == WIRE else "--kv-tier" for tier in tiers)
        raise StartupFailed(f"{', '.join(dict.fromkeys(flags))}: {error}") from error
    return Chosen(
        tuple(
            _tier_codec(tier, spec, rate, codecs.get(spec.name), sample)
            for tier, spec, rate in zip(tiers, chosen, rates, strict=True)
        ),
        notes=tuple(_notes(admission, specs, raw.block_bytes)),
    )


def _require_length(text: Sequence[int], block_size: int) -> None:
    if len(text) <= 2 * block_size:
        raise ValueError(
            f"{len(text)} tokens are too few to measure codecs with blocks of {block_size}: a "
            "smaller --block-size or a larger --max-model-len is needed"
        )


def _require_admitted(wanted: Sequence[str], admission: Admission) -> None:
    for name in wanted:
        if name in admission.refused:
            raise ValueError(f"codec={name} is refused: {admission.refused[name]}")


def _read(model: LoadedModel, text: Sequence[int], block_size: int) -> _Sample:
    """Let the model read the probe, and keep what KV its full blocks have."""
    kept: list[Bytes2D] = []

    def keep(group: int, blocks: Bytes2D) -> None:
        if group == 0:
            kept.append(blocks.copy())

    reading = read_texts(model, [text], keep, block_size=block_size)
    return _Sample(reading, np.concatenate(kept))


def _priced(codec: Codec, sample: _Sample, admission: Admission) -> CodecSpec:
    return price(codec, sample.blocks, loss=charged_loss(admission.measured[codec.name]))


def _rate(tier: TierSettings) -> int:
    if tier.name == WIRE:
        return DISK_RATE  # nothing is chosen by it: a worker measures its links as it goes
    try:
        return tier_bytes_per_s(tier)
    except OSError as error:  # it is said again, with what to do, when the tier is opened
        log.warning("%s could not be measured: %s", tier.path, error)
        return DISK_RATE


def _tier_codec(
    tier: TierSettings, spec: CodecSpec, rate: int, codec: Codec | None, sample: _Sample
) -> TierCodec:
    if codec is None:
        return TierCodec(bytes_per_s=rate)
    slot_bytes = _slot_bytes(codec, sample.blocks)
    if tier.name == Tier.DISK.value and slot_bytes >= SMALL_BYTES:
        slot_bytes = -(-slot_bytes // PAGE_BYTES) * PAGE_BYTES
    return TierCodec(
        name=spec.name,
        is_lossy=not codec.is_lossless,
        slot_bytes=slot_bytes,
        encode_ns=spec.encode_ns,
        decode_ns=spec.decode_ns,
        bytes_per_s=rate,
    )


def _slot_bytes(codec: Codec, blocks: Bytes2D) -> int:
    """Return the size of a slot: fixed by a lossy codec, of a lossless one what blocks need."""
    if not codec.is_lossless:
        return codec.encoded_bytes
    encoded = np.empty((len(blocks), codec.encoded_bytes), np.uint8)
    largest = int(codec.encode(blocks, range(len(blocks)), encoded).max())
    return min(codec.encoded_bytes, -(-int(largest * SLACK) // 64) * 64)


def _notes(admission: Admission, specs: dict[str, CodecSpec], block_bytes: int) -> list[str]:
    notes = []
    for name, measured in admission.measured.items():
        if name not in specs:
            notes.append(f"refused: {admission.refused[name]}")
            continue
        spec = specs[name]
        encode, decode = (block_bytes / ns for ns in (spec.encode_ns, spec.decode_ns))
        notes.append(
            f"{name}: {_told(measured)}; {spec.block_bytes / block_bytes:.2f} of a block, "
            f"{encode:.1f} GB/s in, {decode:.1f} GB/s out on one core"
        )
    return notes


def _told(measured: Measured | None) -> str:
    if measured is None:
        return "bit for bit"
    return (
        f"loss {measured.loss_increase:+.3%} (at most {measured.loss_bound:+.3%}), "
        f"{measured.greedy_agreement:.1%} of greedy tokens the same on the probe"
    )
