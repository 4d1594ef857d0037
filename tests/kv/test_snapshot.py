"""What people are told of the orchestrator is what it has done."""

import msgspec

from penstock.kv.orchestrator import Orchestrator, OrchestratorConfig
from penstock.kv.snapshot import OrchestratorView, view
from penstock.kv.tiers import RAW, CodecSpec, LinkSpec, Tier, TierSpec


class Anywhere:
    def place(self, key, tier, num_bytes) -> int:
        return 1000 * key

    def vacate(self, tier, address, num_bytes) -> None:
        pass


def test_a_view_tells_all_and_survives_json():
    config = OrchestratorConfig(
        tiers=(
            TierSpec(tier=Tier.HBM, capacity_bytes=1000),
            TierSpec(tier=Tier.DRAM, capacity_bytes=1000),
        ),
        links=(LinkSpec(source=Tier.DRAM, destination=Tier.HBM, latency_ns=10, bytes_per_ns=1),),
        codecs=(
            CodecSpec(name=RAW, block_bytes=100),
            CodecSpec(name="int8", block_bytes=50, decode_ns=5),
        ),
        target=Tier.HBM,
    )
    orchestrator = Orchestrator(config, Anywhere())
    for key in (1, 2, 3):
        orchestrator.store(key, Tier.DRAM, "int8")
    orchestrator.expect(1, 0)
    orchestrator.need(2, 0, 0)
    orchestrator.need(9, 0, 0)
    ((descriptor,), _) = orchestrator.start(0)
    orchestrator.landed(descriptor, 60)
    (_, (job,)) = orchestrator.start(60)
    orchestrator.worked(job, 65)
    orchestrator.waited(2, 0, 65)
    seen = view(orchestrator, 65)
    (link,) = seen.links
    assert (link.source, link.destination) == ("dram", "hbm")
    assert link.num_bytes == {"onboard": 50}
    assert (link.exposed_ns, seen.codec_exposed_ns, seen.codec_busy_ns) == (60, 5, 5)
    assert seen.needs == {"hit": 0, "coming": 1, "missing": 1}
    assert seen.coded == {"encode": 0, "decode": 1}
    assert seen.tiers["dram"]["codecs"] == {"int8": 3}
    assert seen.tiers["hbm"]["num_arriving"] == 1, "the prefetch is on its way"
    assert msgspec.json.decode(msgspec.json.encode(seen), type=OrchestratorView) == seen
