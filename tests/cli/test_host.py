"""What the host finds out about a model before it forks: facts and the size of the KV cache."""

import pytest

from penstock.cli.cluster import BUILTIN_MODEL
from penstock.cli.host import compile_once, load
from penstock.core.config import EngineConfig
from penstock.core.errors import StartupFailed
from penstock.core.types import GIB, MIB
from penstock.native.build import Recipe
from penstock.runtime.instant import DESCRIPTION
from penstock.runtime.processes import available_bytes
from penstock.runtime.settings import ClusterSettings, ModelFacts


def facts_of(executor: str = "model", **options: object) -> ModelFacts:
    names = ("max_num_seqs", "mixed", "prefill", "transport")
    limits = {k: options.pop(k) for k in names if k in options}
    settings = ClusterSettings(
        engine=EngineConfig(**{"model": str(BUILTIN_MODEL), **options}), executor=executor, **limits
    )
    stages: list[tuple[str, float]] = []
    facts, _ = load(settings, lambda stage, fraction: stages.append((stage, fraction)))
    assert stages
    assert all(0 <= fraction <= 1 for _, fraction in stages)
    return facts


def test_the_instant_executor_has_the_models_vocabulary_and_says_what_it_is():
    facts = facts_of("instant", max_model_len=100)
    assert (facts.vocab_size, facts.eos_token_ids, facts.max_model_len) == (4096, (0, 5), 100)
    assert facts.description == DESCRIPTION
    assert facts.layout.token_bytes == 16


def test_the_instant_executor_wants_a_folder():
    with pytest.raises(StartupFailed, match=r"config\.json"):
        facts_of("instant", model="org/name")


def test_nixl_that_is_missing_is_said_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("penstock.cli.host.is_installed", lambda: False)
    with pytest.raises(StartupFailed, match=r"--transport nixl: .* pip install 'penstock\[nixl\]'"):
        facts_of("instant", transport="nixl")


def test_compiling_is_a_stage_of_its_own_the_first_time(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "two.cpp").write_text('extern "C" int two() { return 2; }')
    stages: list[str] = []
    for _ in range(2):
        compile_once(Recipe("two", "the two", tmp_path), lambda stage, _: stages.append(stage))
    assert [stage.split(" with ")[0] for stage in stages[:1]] == ["compiling the two"]
    assert len(stages) == 2  # begun and ended, once


def kv_bytes(facts: ModelFacts) -> int:
    return sum(n * size for n, size in zip(facts.num_blocks, facts.layout.block_bytes, strict=True))


@pytest.mark.slow
def test_the_kv_cache_is_what_was_asked_for_or_what_is_of_use():
    asked = facts_of(kv_cache_bytes=10 * MIB)
    assert 9.5 * MIB < kv_bytes(asked) <= 10 * MIB
    assert asked.folder == str(BUILTIN_MODEL)
    # All sequences at full length, and no more than that, when there is memory enough.
    useful = facts_of(max_num_seqs=32)
    all_tokens = 32 * useful.max_model_len
    assert useful.num_blocks[0] * useful.layout.block_size == all_tokens
    # A share of what is free when there is not.
    scarce = facts_of(max_num_seqs=1_000_000)
    assert 0.1 * available_bytes() < kv_bytes(scarce) * 2 < 0.6 * available_bytes()
    with pytest.raises(StartupFailed, match="--kv-cache-memory: 2 workers with 524288 MiB each"):
        facts_of(kv_cache_bytes=512 * GIB)
