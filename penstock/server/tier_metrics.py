"""Names of what is counted of the tiers below the workers' pools; `metrics.py` shows them."""

from collections.abc import Iterator, Mapping
from typing import Final

from penstock.core.messages import Load
from penstock.core.tiers import TierLoad
from penstock.core.types import NS_PER_S

TIER_TOTALS: Final = {
    "kv_tier_hits": "num_hits",
    "kv_tier_offloaded_bytes": "bytes_in",
    "kv_tier_onboarded_bytes": "bytes_out",
    "kv_tier_corrupt": "num_corrupt",
    "kv_tier_failed": "num_failed",
    "kv_tier_evicted": "num_evicted",
    "kv_tier_offloaded_raw_bytes": "raw_bytes_in",
    "kv_tier_onboarded_raw_bytes": "raw_bytes_out",
    "kv_tier_wanted": "num_wanted",
    "kv_tier_declined": "num_declined",
}
"""Totals of a tier, by the field of `TierLoad` that has them."""

TIER_TIMES: Final = {
    "kv_tier_exposed_seconds": "exposed_ns",
    "kv_tier_encode_seconds": "encode_ns",
    "kv_tier_decode_seconds": "decode_ns",
    "kv_tier_exposed_decode_seconds": "exposed_decode_ns",
}
"""The same of times."""

PREFETCH_OUTCOMES: Final = ("used", "late", "missed", "wasted", "dropped")
"""What comes of a wish; `PrefetchLoad` has as many numbers."""

TIER_HELP: Final = {
    "kv_tier_usage_perc": "Share of a tier's slots that hold a block, 1 is full.",
    "kv_tier_hits": "Blocks that came back from a tier for a request.",
    "kv_tier_offloaded_bytes": "Bytes written to a tier.",
    "kv_tier_onboarded_bytes": "Bytes read from a tier.",
    "kv_tier_corrupt": "Blocks that came back wrong from a tier: dropped and computed again.",
    "kv_tier_failed": "Blocks that could not be written to a tier or read from it.",
    "kv_tier_evicted": "Blocks that a tier gave up for others.",
    "kv_tier_offloaded_raw_bytes": "What was written to a tier, before its codec.",
    "kv_tier_onboarded_raw_bytes": "What was read from a tier, after its codec.",
    "kv_tier_encode_seconds": "Time in a tier's codec on the way in.",
    "kv_tier_decode_seconds": "Time in a tier's codec on the way out.",
    "kv_tier_wanted": "Blocks in a tier that a request came for; hits are those that were brought.",
    "kv_tier_declined": "Blocks not written to a tier: what they would save is not worth it.",
    "kv_tier_exposed_seconds": "Time that requests whose turn it was waited for a tier's blocks.",
    "kv_tier_exposed_decode_seconds": "The part of it for which a tier's codec was decoding.",
    "kv_prefetches": "Prefixes wished for ahead of need, by outcome: used (there by then), "
    "late (on the way), missed (not begun), wasted (brought in vain), dropped (withdrawn).",
}


def tier_totals(
    tiers: Mapping[tuple[str, str, str], TierLoad], loads: Mapping[tuple[str, str], Load]
) -> Iterator[tuple[str, str, dict[tuple[str, ...], float]]]:
    """Yield each total: its name, what the last label is beside worker and role, and its values."""
    for name, field in TIER_TOTALS.items():
        yield name, "tier", {key: getattr(tier, field) for key, tier in tiers.items()}
    for name, field in TIER_TIMES.items():
        yield name, "tier", {key: getattr(tier, field) / NS_PER_S for key, tier in tiers.items()}
    wishes: dict[tuple[str, ...], float] = {
        (*key, outcome): getattr(load.prefetches, f"num_{outcome}")
        for key, load in loads.items()
        if load.prefetches
        for outcome in PREFETCH_OUTCOMES
    }
    yield "kv_prefetches", "outcome", wishes
