"""Names of what is counted of the tiers below the workers' pools; `metrics.py` shows them."""

from typing import Final

TIER_TOTALS: Final = {
    "kv_tier_hits": "num_hits",
    "kv_tier_offloaded_bytes": "bytes_in",
    "kv_tier_onboarded_bytes": "bytes_out",
    "kv_tier_corrupt": "num_corrupt",
    "kv_tier_failed": "num_failed",
    "kv_tier_evicted": "num_evicted",
    "kv_tier_offloaded_raw_bytes": "raw_bytes_in",
    "kv_tier_onboarded_raw_bytes": "raw_bytes_out",
}
"""Totals of a tier, by the field of `TierLoad` that has them."""

TIER_TIMES: Final = {
    "kv_tier_exposed_seconds": "exposed_ns",
    "kv_tier_encode_seconds": "encode_ns",
    "kv_tier_decode_seconds": "decode_ns",
}
"""The same of times."""

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
    "kv_tier_exposed_seconds": "Time that requests waited for blocks from a tier.",
}
