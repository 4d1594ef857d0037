"""Workers on a device: what is asked for, what there is, and what each of them gets."""

import os
import shutil
import time

import msgspec
import psutil
import pytest
import torch

from penstock.cli import device
from penstock.cli.cluster import BUILTIN_MODEL
from penstock.cli.device import choose_device, load_on_device
from penstock.cli.host import load
from penstock.core.config import EngineConfig, Handoff
from penstock.core.errors import StartupFailed
from penstock.core.types import GIB
from penstock.engine.device import CudaFacts, in_child
from penstock.kv.quality import parse_quality
from penstock.runtime.settings import ClusterSettings, NetworkSettings, TierSettings
from tests.engine.tiny_models import save_model

H200 = CudaFacts("NVIDIA H200", 140 * GIB, 139 * GIB)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, "llama", max_position_embeddings=1 << 20)
    return str(folder)


def settings(model: str, **engine) -> ClusterSettings:
    options = {"device": "cuda", **engine}
    return ClusterSettings(
        engine=EngineConfig(model=model, **options), prefill=0, decode=0, mixed=1
    )


def gpus(monkeypatch, *found: CudaFacts) -> None:
    monkeypatch.setattr(device, "probe_cuda", lambda: found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is at hand")
def test_without_a_gpu_one_is_told_what_to_do(model):
    with pytest.raises(StartupFailed, match=r"--device cuda: .*use --device cpu"):
        load(settings(model), lambda *_: None)


def test_a_device_that_is_none_is_refused(model):
    with pytest.raises(StartupFailed, match="none of cpu, cuda, cuda:N and auto"):
        load(settings(model, device="tpu"), lambda *_: None)


def test_a_gpu_that_is_not_there_is_refused(model, monkeypatch):
    gpus(monkeypatch, H200)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(StartupFailed, match=r"cuda:3: .*CUDA_VISIBLE_DEVICES"):
        load_on_device(settings(model, device="cuda:3"))


def test_what_a_gpus_blocks_cannot_do_is_refused(model, monkeypatch):
    gpus(monkeypatch, H200)
    pushing = msgspec.structs.replace(settings(model), handoff=Handoff.PUSH)
    with pytest.raises(StartupFailed, match="does not go with --handoff push"):
        load_on_device(pushing)
    listening = msgspec.structs.replace(settings(model), network=NetworkSettings(host="::1"))
    with pytest.raises(StartupFailed, match="does not go with --listen"):
        load_on_device(listening)
    coded = {"handoff_codec": "int8", "kv_quality": parse_quality("5%")}
    wired = msgspec.structs.replace(listening, **coded)
    with pytest.raises(StartupFailed, match="does not go with --handoff-codec"):
        load_on_device(wired)


def test_two_workers_on_a_gpu_have_half_of_it_each(model, monkeypatch):
    gpus(monkeypatch, H200)
    one, _ = load_on_device(settings(model))
    pair = msgspec.structs.replace(settings(model), prefill=1, decode=1, mixed=0)
    two, _ = load_on_device(pair)
    gpus(monkeypatch, H200, H200)
    apart, _ = load_on_device(pair)
    assert two.num_blocks[0] == pytest.approx(one.num_blocks[0] / 2, rel=0.02)
    assert apart.num_blocks == one.num_blocks


def test_auto_is_a_gpu_if_it_can_be_used(model, monkeypatch):
    auto = EngineConfig(model=model, device="auto")
    gpus(monkeypatch, H200)
    monkeypatch.setattr(device, "is_kernel_compiler_present", lambda: True)
    assert choose_device(auto).device == "cuda"
    monkeypatch.setattr(device, "is_kernel_compiler_present", lambda: False)
    assert choose_device(auto).device == "cpu"
    monkeypatch.setattr(device, "is_kernel_compiler_present", lambda: True)
    gpus(monkeypatch)
    assert choose_device(auto).device == "cpu"


def test_the_kv_cache_gets_what_weights_and_work_leave_of_a_share(model, monkeypatch):
    gpus(monkeypatch, H200)
    half, _ = load_on_device(settings(model, gpu_memory_utilization=0.5))
    whole, _ = load_on_device(settings(model, gpu_memory_utilization=1.0))
    assert half.layout is not None
    (block_bytes,) = half.layout.block_bytes
    difference = (whole.num_blocks[0] - half.num_blocks[0]) * block_bytes
    assert difference == pytest.approx(70 * GIB, rel=1e-3)
    assert half.num_blocks[0] * block_bytes < 70 * GIB - GIB
    assert "NVIDIA H200" in half.description
    assert "bfloat16" in half.description


def test_a_share_that_is_too_small_is_refused_with_figures(model, monkeypatch):
    gpus(monkeypatch, CudaFacts("small", 2 * GIB, 2 * GIB))
    with pytest.raises(StartupFailed, match=r"--gpu-memory-utilization 0.4: .* leaves 0.0"):
        load_on_device(settings(model, gpu_memory_utilization=0.4))


def test_planning_leaves_a_process_that_can_be_forked(model, monkeypatch):
    gpus(monkeypatch, H200)
    load_on_device(settings(model))
    assert not torch.cuda.is_initialized()


@pytest.fixture(scope="module")
def readable(tmp_path_factory) -> str:
    """A model that the interpreter can afford, with a tokeniser."""
    folder = tmp_path_factory.mktemp("readable")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    save_model(folder, "llama", vocab_size=4096, max_position_embeddings=80, head_dim=32, **sizes)
    for path in BUILTIN_MODEL.glob("token*"):
        shutil.copy(path, folder)
    return str(folder)


def tiered(model: str, device_name: str, loss: str) -> ClusterSettings:
    return msgspec.structs.replace(
        settings(model, device=device_name, dtype="float32", kv_cache_bytes=1 << 20),
        tiers=(TierSettings(name="dram", num_bytes=1 << 20, codec="int8"),),
        kv_quality=parse_quality(loss),
    )


def test_codecs_that_are_not_measured_in_time_end_the_start(readable, monkeypatch):
    monkeypatch.setattr(device, "CODECS_TIMEOUT_S", 0.2)
    monkeypatch.setattr(device, "load_model", lambda *_: time.sleep(60))
    before = psutil.Process().children()
    with pytest.raises(
        StartupFailed, match=r"--kv-tier: .* no answer within 0\.2 s: say codec=raw"
    ):
        load_on_device(tiered(readable, "interpreter", "1%"))
    assert psutil.Process().children() == before


def test_a_child_answers_or_dies_or_takes_too_long():
    before = psutil.Process().children()
    assert in_child(lambda: b"x" * 200_000, 60.0) == b"x" * 200_000
    assert in_child(lambda: os._exit(1), 60.0) == b""
    with pytest.raises(TimeoutError, match=r"within 0\.1 s"):
        in_child(lambda: time.sleep(60) or b"late", 0.1)
    assert psutil.Process().children() == before


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on a GPU then")
def test_codecs_are_measured_on_a_device_as_on_the_cpu(readable):
    found = []
    for name in ("cpu", "interpreter"):
        facts, _ = load(tiered(readable, name, "5%"), lambda *_: None)
        (codec,) = facts.tier_codecs
        found.append((codec.name, codec.is_lossy, codec.slot_bytes, facts.codec_notes[0][:30]))
    assert found[0] == found[1]


def test_what_the_child_that_measures_codecs_says_is_heard(readable, monkeypatch):
    def refuse(*_):
        raise StartupFailed("codec=int8 is refused")

    asked = tiered(readable, "interpreter", "5%")
    monkeypatch.setattr(device, "load_model", lambda *_: None)
    monkeypatch.setattr(device, "choose_codecs", refuse)
    with pytest.raises(StartupFailed, match="codec=int8 is refused"):
        load_on_device(asked)
    monkeypatch.setattr(device, "choose_codecs", lambda *_: os._exit(1))
    with pytest.raises(StartupFailed, match="has died"):
        load_on_device(asked)
