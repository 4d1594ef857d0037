"""What the orchestrator would tell a person: residency, links, prefetches, codecs, as plain values.

For `GET /kv/residency`, metrics and the simulator's JSON: it reads and changes nothing.
"""

from msgspec import Struct

from penstock.kv.compression import Direction
from penstock.kv.orchestrator import Orchestrator


class LinkView(Struct, frozen=True, kw_only=True):
    """One link: what crossed it, and for how long computation waited for it. Times in ns."""

    source: str
    destination: str
    num_bytes: dict[str, int]
    num_descriptors: int
    num_transfers: int
    num_late: int
    num_cancelled: int
    num_promoted: int
    busy_ns: int
    exposed_ns: int
    waiting: dict[str, int]


class OrchestratorView(Struct, frozen=True, kw_only=True):
    """Everything at one moment. `tiers` is `Residency.snapshot`."""

    tiers: dict[str, dict[str, dict[str, int] | int]]
    links: list[LinkView]
    needs: dict[str, int]
    prefetch: dict[str, int]
    evicted: dict[str, int]
    coded: dict[str, int]
    codec_busy_ns: int
    codec_exposed_ns: int


def view(orchestrator: Orchestrator, now_ns: int) -> OrchestratorView:
    """Return the state and the books. O(blocks)."""
    dma, books = orchestrator.dma, orchestrator.prefetch.books
    codecs = orchestrator.compression.books
    links = []
    for spec in dma.links:
        its = dma.books(spec.ends)
        links.append(
            LinkView(
                source=spec.source.value,
                destination=spec.destination.value,
                num_bytes={kind.value: size for kind, size in its.num_bytes.items() if size},
                num_descriptors=its.num_descriptors,
                num_transfers=its.num_transfers,
                num_late=its.num_late,
                num_cancelled=its.num_cancelled,
                num_promoted=its.num_promoted,
                busy_ns=its.busy_ns,
                exposed_ns=its.exposed_ns,
                waiting={k.value: n for k in its.num_bytes if (n := dma.num_waiting(spec.ends, k))},
            )
        )
    return OrchestratorView(
        tiers=orchestrator.residency.snapshot(now_ns),
        links=links,
        needs={outcome.value: n for outcome, n in orchestrator.num_needs.items()},
        prefetch={
            "used": books.used,
            "late": books.late,
            "missed": books.missed,
            "wasted": books.wasted,
            "dropped": books.dropped,
        },
        evicted={tier.value: n for tier, n in orchestrator.num_evicted.items()},
        coded={d.value: codecs.num_done[d] for d in Direction},
        codec_busy_ns=sum(codecs.busy_ns.values()),
        codec_exposed_ns=codecs.exposed_ns,
    )
