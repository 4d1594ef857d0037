"""What does a codec on the wire save between hosts?

A real cluster of one prefill and one decode worker, the built-in model in bf16, whose KV crosses
TCP over a link of a given rate (`bench/slow_link.py`: emulated, on this machine). Prompts of 2,048
tokens that nobody has seen, one at a time, raw and in each codec in turn on the same link, pulled
when all is computed (`whole`: the pull is all exposed) or as it is computed (`stream`). What is
reported is the time that pulling took, the bytes that crossed, and the time to first token. Workers
decide by themselves whether the codec pays; the first pulls, by which they learn the link, are not
counted. What a codec costs the model is measured at its start and stands in the settings.

    python bench/wire.py [--rates MB_PER_S ...] [--codecs NAME ...] [--quick] [--output FILE]
"""

import argparse
import asyncio
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from msgspec.structs import replace
from report import Report

from penstock.cli.cluster import BUILTIN_MODEL
from penstock.core.config import EngineConfig, Handoff
from penstock.core.descriptors import Endpoint
from penstock.core.messages import Hello, Message, RequestFailed, TokenOutput
from penstock.core.request import Request, SamplingParams, Timeline
from penstock.core.types import MIB, RequestId
from penstock.kv.quality import KvQuality
from penstock.runtime.local import LocalCluster
from penstock.runtime.settings import ClusterSettings

PROMPT_TOKENS = 2048
RUNS = 7
WARM_UP = 6
QUALITY = KvQuality(loss_max=0.02)
PARAMS = SamplingParams(max_tokens=2, temperature=0.0, seed=1, ignore_eos=True)


class LinkedCluster(LocalCluster):
    """A cluster whose workers read each other over a slow link."""

    bytes_per_s = 0.0
    relays: ClassVar[list["subprocess.Popen[str]"]] = []

    def _receive(self, message: Message) -> None:
        if isinstance(message, Hello) and message.info.endpoints:
            (endpoint,) = message.info.endpoints
            words = [sys.executable, str(Path(__file__).with_name("slow_link.py"))]
            link = subprocess.Popen(
                [*words, endpoint.address, str(self.bytes_per_s)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self.relays.append(link)
            assert link.stdout is not None
            address = link.stdout.readline().strip()
            endpoints = (Endpoint(endpoint.kind, address),)
            message = Hello(info=replace(message.info, endpoints=endpoints))
        super()._receive(message)

    async def stop(self) -> None:
        """End the cluster and its links."""
        await super().stop()
        for relay in self.relays:
            relay.kill()
            relay.wait()
        self.relays.clear()


async def ask(cluster: LocalCluster, number: int) -> tuple[Timeline, float]:
    """Return where the time of one request went, and its time to first token in seconds."""
    rng = random.Random(number)
    begun = time.monotonic()
    end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    first: list[tuple[Timeline, float]] = []

    def take(event: TokenOutput | RequestFailed) -> None:
        if isinstance(event, RequestFailed):
            end.set_exception(RuntimeError(event.reason))
            return
        if event.timeline is not None and not first:
            first.append((event.timeline, time.monotonic() - begun))
        if event.finish_reason is not None:
            end.set_result(None)

    cluster.submit(
        Request(
            request_id=RequestId(f"r{number}"),
            prompt_token_ids=tuple(rng.randrange(10, 4000) for _ in range(PROMPT_TOKENS)),
            params=PARAMS,
            accepts_loss=True,
            arrived_ns=time.monotonic_ns(),
        ),
        take,
    )
    await end
    return first[0]


async def measure(codec: str, handoff: Handoff, bytes_per_s: float) -> list[tuple[Timeline, float]]:
    """Return what the requests of one cluster took, those apart by which it learnt its link."""
    settings = ClusterSettings(
        engine=EngineConfig(model=str(BUILTIN_MODEL), dtype="bfloat16", kv_cache_bytes=256 * MIB),
        transport="tcp",
        handoff=handoff,
        handoff_codec=codec,
        kv_quality=QUALITY,
    )
    with tempfile.TemporaryDirectory(prefix="pw-") as folder:
        LinkedCluster.bytes_per_s = bytes_per_s
        cluster = LinkedCluster.launch(settings, parent=Path(folder))
        async with cluster:
            return [await ask(cluster, i) for i in range(WARM_UP + RUNS)][WARM_UP:]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rates", type=float, nargs="+", default=[125.0, 312.5], metavar="MB_PER_S")
    add("--codecs", nargs="+", default=["raw", "int8", "int4"], metavar="NAME")
    add("--quick", action="store_true", help="one rate, one way, one codec; within 45 s")
    add("--output", metavar="FILE")
    options = parser.parse_args()
    ways = [Handoff.WHOLE] if options.quick else [Handoff.WHOLE, Handoff.STREAM]
    rates = options.rates[:1] if options.quick else options.rates
    codecs = options.codecs[:2] if options.quick else options.codecs
    report = Report("wire", settings={"prompt_tokens": PROMPT_TOKENS, "link": "emulated"})
    for rate in rates:
        for way in ways:
            for codec in codecs:
                rows = asyncio.run(measure(codec, way, rate * 1e6))
                of = f"{codec}_{way.value}_{rate:g}MBps"
                note = f"{rows[-1][0].pull_bytes} bytes by {rows[-1][0].transport}"
                pulls = [timeline.pull_copy_ns / 1e6 for timeline, _ in rows]
                report.add(f"pull_ms_{of}", pulls, "ms", note=note)
                link_ms = [t.pull_bytes / rate / 1e3 for t, _ in rows]
                report.add(f"link_ms_{of}", link_ms, "ms", note="what the bytes take by themselves")
                report.add(f"ttft_ms_{of}", [ttft_s * 1e3 for _, ttft_s in rows], "ms")
                report.add(f"pull_bytes_{of}", [float(t.pull_bytes) for t, _ in rows], "bytes")
    report.finish(options.output)


if __name__ == "__main__":
    main()
