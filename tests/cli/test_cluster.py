"""From options to settings."""

import pytest

from penstock.cli import control_arguments
from penstock.cli.arguments import make_parser
from penstock.cli.cluster import BUILTIN_MODEL, cluster_settings, model_name
from penstock.control.policies import POLICIES
from penstock.core.config import ControllerConfig, Handoff
from penstock.core.errors import StartupFailed
from penstock.runtime.settings import ClusterSettings


def settings_for(*arguments: str) -> ClusterSettings:
    return cluster_settings(make_parser().parse_args(["serve", *arguments]))


@pytest.mark.parametrize(
    ("arguments", "counts"),
    [
        ("", (1, 1, 0)),
        ("--decode 3", (1, 3, 0)),
        ("--prefill 2", (2, 1, 0)),
        ("--mixed 1", (0, 0, 1)),
        ("--mixed 2 --prefill 1", (1, 1, 2)),
        ("--prefill 0 --decode 0 --mixed 1", (0, 0, 1)),
        ("--prefill 0 --mixed 1", (0, 0, 1)),
    ],
)
def test_workers_that_are_not_named_are_what_makes_sense(
    arguments: str, counts: tuple[int, int, int]
):
    settings = settings_for(*arguments.split())
    assert (settings.prefill, settings.decode, settings.mixed) == counts


def test_workers_are_named_by_role():
    names = list(settings_for("--prefill", "2", "--decode", "1", "--mixed", "1").workers())
    assert names == ["prefill-0", "prefill-1", "decode-0", "mixed-0"]


@pytest.mark.parametrize("arguments", ["--prefill 0", "--decode 0", "--prefill 0 --decode 0"])
def test_a_cluster_that_cannot_serve_is_refused(arguments: str):
    with pytest.raises(StartupFailed, match="--mixed 1"):
        settings_for(*arguments.split())


def test_every_option_arrives():
    arguments = (
        "some/model --dtype float32 --load-format dummy --model-impl transformers --revision r1 "
        "--trust-remote-code --block-size 16 --kv-cache-memory 1MiB --max-model-len 77 --seed 5 "
        "--max-num-seqs 3 --max-num-batched-tokens 9 --no-prefix-caching --threads 2 --pin-cores "
        "--decision-log log --executor instant"
    )
    settings = settings_for(*arguments.split())
    engine = settings.engine
    assert engine.model == "some/model"
    assert (engine.dtype, engine.load_format, engine.model_impl) == (
        "float32",
        "dummy",
        "transformers",
    )
    assert (engine.revision, engine.trust_remote_code, engine.seed) == ("r1", True, 5)
    assert (engine.block_size, engine.kv_cache_bytes, engine.max_model_len) == (16, 1 << 20, 77)
    assert (settings.max_num_seqs, settings.max_num_batched_tokens) == (3, 9)
    assert (settings.is_prefix_caching, settings.threads, settings.is_pinned) == (False, 2, True)
    assert (settings.decision_log, settings.executor) == ("log", "instant")


def test_without_a_model_the_built_in_one_is_served():
    assert settings_for().engine.model == str(BUILTIN_MODEL)
    assert (BUILTIN_MODEL / "config.json").is_file()


def test_a_model_is_called_by_the_last_part_of_its_name(tmp_path, monkeypatch):
    assert model_name("Qwen/Qwen3-0.6B") == "Qwen3-0.6B"
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert model_name(".") == "mine"
    assert model_name(f"{tmp_path}/mine/") == "mine"


def test_the_built_in_model_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert settings_for("penstock-tiny").engine.model == str(BUILTIN_MODEL)
    (tmp_path / "penstock-tiny").mkdir()
    assert settings_for("penstock-tiny").engine.model == "penstock-tiny"


def test_scheduling_and_hand_off():
    settings = settings_for()
    assert settings.control == ControllerConfig(policy="predicted", is_switching_roles=True)
    assert settings.handoff is Handoff.STREAM
    words = "--policy arrow --slo-ttft-ms 500 --slo-tpot-ms 25.5 --no-role-switching --handoff push"
    settings = settings_for(*words.split())
    assert settings.control == ControllerConfig(
        policy="arrow", slo_ttft_ms=500.0, slo_tpot_ms=25.5, is_switching_roles=False
    )
    assert settings.handoff is Handoff.PUSH


def test_the_policies_to_choose_from_are_those_there_are():
    assert tuple(POLICIES) == control_arguments.POLICIES


def test_tiers_are_named_nearest_first():
    settings = settings_for("--kv-tier", "dram=1GiB", "--kv-tier", "disk=/a,b,2MiB")
    assert [(t.name, t.num_bytes, t.path) for t in settings.tiers] == [
        ("dram", 1 << 30, ""),
        ("disk", 2 << 20, "/a,b"),
    ]
    assert settings_for().tiers == ()


@pytest.mark.parametrize("tier", ["dram", "disk=1GiB", "dram=/a,1GiB", "tape=1GiB", "dram=x"])
def test_what_is_no_tier_is_refused(tier: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        settings_for("--kv-tier", tier)
    assert "--kv-tier" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tiers", "reason"),
    [(["dram=1GiB", "dram=2GiB"], "each tier once"), (["disk=/a,1GiB", "dram=1GiB"], "comes last")],
)
def test_an_order_of_tiers_that_cannot_be_is_refused(tiers: list[str], reason: str):
    with pytest.raises(StartupFailed, match=reason):
        settings_for(*(part for tier in tiers for part in ("--kv-tier", tier)))
