"""A host that asks a running cluster to be let in, both in this process: what goes wrong, and what
is said about it.
"""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.cli.cluster import BUILTIN_MODEL
from penstock.core.config import EngineConfig
from penstock.core.errors import StartupFailed
from penstock.core.types import MIB
from penstock.runtime import joined
from penstock.runtime.folder import RunFolder
from penstock.runtime.joined import JoinedHost, JoinSettings
from penstock.runtime.local import LocalCluster
from penstock.runtime.settings import INSTANT_EXECUTOR, ClusterSettings, NetworkSettings
from penstock.transport.key import VARIABLE

pytestmark = pytest.mark.usefixtures("no_leaks")

Ask = Callable[..., Awaitable[JoinedHost]]


def run(story: Callable[[Ask], Awaitable[None]], key_file: str | None = None) -> None:
    """Tell a story over a cluster without workers; `ask` has a host ask to be let in there."""

    async def tell(parent: Path) -> None:
        engine = EngineConfig(model=str(BUILTIN_MODEL), kv_cache_bytes=16 * MIB)
        network = NetworkSettings(host="127.0.0.1", key_file=key_file)
        settings = ClusterSettings(
            engine=engine, prefill=0, decode=0, executor=INSTANT_EXECUTOR, network=network
        )
        hosts: list[JoinedHost] = []
        cluster = LocalCluster.launch(settings, parent=parent)
        async with asyncio.timeout(60), cluster:
            port = int(cluster.join_address.rpartition(":")[2])

            async def ask(**changes: str) -> JoinedHost:
                asked = replace(JoinSettings(host="127.0.0.1", port=port, name="there"), **changes)
                host = JoinedHost(asked, RunFolder.create(parent))
                hosts.append(host)
                await host.ask()
                return host

            try:
                await story(ask)
            finally:
                for host in hosts:
                    await host.stop()

    with tempfile.TemporaryDirectory(prefix="pt-") as parent:
        asyncio.run(tell(Path(parent)))


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "a key for this test alone")


def test_it_learns_what_the_cluster_serves_and_gets_a_name_of_its_own():
    async def story(ask: Ask) -> None:
        first, second = await ask(), await ask()
        assert (first.admitted.name, second.admitted.name) == ("there", "there.2")
        assert first.admitted.engine.model == str(BUILTIN_MODEL)
        assert first.admitted.executor == INSTANT_EXECUTOR
        assert first.listen_host == "127.0.0.1"
        assert first.admitted.epoch > 1_600_000_000  # later than that of any earlier start

    run(story)


def test_an_address_by_which_it_is_not_reached_is_explained(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(joined, "ANSWER_TIMEOUT_S", 1.0)

    async def story(ask: Ask) -> None:
        with pytest.raises(
            StartupFailed, match=r"not reach this host at 127\.0\.0\.2:\d+: .*--adv"
        ):
            await ask(advertised="127.0.0.2")

    run(story)


def test_another_version_is_refused_with_both(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(joined, "VERSION", "0.0.0")

    async def story(ask: Ask) -> None:
        with pytest.raises(StartupFailed, match=r"has Penstock 0\.0\.0 .*install the same version"):
            await ask()

    run(story)


def test_the_key_may_lie_in_a_file_and_must_be_the_same(tmp_path: Path):
    right, wrong = tmp_path / "right", tmp_path / "wrong"

    async def story(ask: Ask) -> None:
        assert (await ask(key_file=str(right))).admitted.name == "there"
        with pytest.raises(StartupFailed, match="does not accept our cluster key"):
            await ask(key_file=str(wrong))
        assert oct(right.stat().st_mode)[-3:] == "600"

    run(story, key_file=str(right))
