"""Files as workloads: each format told by its columns, in miniature."""

import gzip
from pathlib import Path

import pytest

from penstock.core.errors import BadRequest
from penstock.core.types import NS_PER_MS, NS_PER_S
from penstock.sim.traces import read_workload

MOONCAKE = """\
{"timestamp": 3000, "input_length": 1000, "output_length": 7, "hash_ids": [0, 1]}
{"timestamp": 3000, "input_length": 1100, "output_length": 8, "hash_ids": [0, 2, 3]}
{"timestamp": 6000, "input_length": 1024, "output_length": 9, "hash_ids": [0, 2]}
"""


def write(folder: Path, text: str, name: str = "w") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_mooncake_stamps_are_spread_and_hash_ids_are_shared_blocks(tmp_path: Path) -> None:
    recording = read_workload(write(tmp_path, MOONCAKE))
    assert (recording.kind, recording.is_timed) == ("mooncake", True)
    prompts = {a.output_tokens: a.prompt() for a in recording.arrivals}
    assert {o: len(p) for o, p in prompts.items()} == {7: 1000, 8: 1100, 9: 1024}
    assert prompts[7][:512] == prompts[8][:512]
    assert prompts[8][:1024] == prompts[9]
    assert not set(prompts[7][512:]) & set(prompts[8])
    times = [a.at_ns for a in recording.arrivals]
    assert times == sorted(times)
    assert times[0] == 0
    assert len(set(times)) == 3
    assert times[-1] < 6000 * NS_PER_MS


def test_the_same_seed_spreads_in_the_same_way_and_a_file_may_be_gzipped(tmp_path: Path) -> None:
    path = write(tmp_path, MOONCAKE)
    (tmp_path / "z").write_bytes(gzip.compress(MOONCAKE.encode()))
    assert read_workload(path, 3).arrivals == read_workload(str(tmp_path / "z"), 3).arrivals
    assert read_workload(path, 3).arrivals != read_workload(path, 4).arrivals


def test_azure_servegen_and_lengths(tmp_path: Path) -> None:
    azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
    azure += "2023-11-16 18:15:50.6805900,396,109\n"
    first, second = read_workload(write(tmp_path, azure)).arrivals
    assert (first.input_tokens, first.output_tokens) == (374, 44)
    assert second.at_ns - first.at_ns == pytest.approx(4 * NS_PER_S, abs=1000)
    servegen = "arrival_s,client_id,input_tokens,output_tokens\n0.5,37,217,343\n2.5,1,7,1\n"
    first, second = read_workload(write(tmp_path, servegen)).arrivals
    assert (second.at_ns, second.input_tokens) == (2 * NS_PER_S, 7)
    lengths = "num_prefill_tokens,num_decode_tokens,pd_ratio\n3742,284,1\n18,243,2\n"
    recording = read_workload(write(tmp_path, lengths))
    assert not recording.is_timed
    assert sorted(a.input_tokens for a in recording.arrivals) == [18, 3742]


def test_longbench_draws_as_many_as_it_has_samples(tmp_path: Path) -> None:
    table = "dataset,task_type,avg_length,unit,language,samples,max_new_tokens\n"
    table += "gov_report,Summarization,8734,words,EN,2000,512\n"
    arrivals = read_workload(write(tmp_path, table)).arrivals
    assert len(arrivals) == 2000
    mean = sum(a.input_tokens for a in arrivals) / 2000
    assert mean == pytest.approx(8734 * 1.35, rel=0.05)
    assert {a.output_tokens for a in arrivals} == {512}


def test_calls_of_an_agent_are_turns_of_one_session(tmp_path: Path) -> None:
    lines = "".join(
        f'{{"session_id": "s", "call": {i}, "input_length": {n}, "output_length": {o},'
        f' "hash_ids": {list(range(-(-n // 64)))}}}\n'
        for i, (n, o) in enumerate([(130, 10), (160, 20), (170, 5)])
    )
    (arrival,) = read_workload(write(tmp_path, lines)).arrivals
    assert arrival.input_tokens == 130
    assert [(t.new_tokens, t.output_tokens) for t in arrival.turns] == [(20, 20), (1, 5)]


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "{oops\n", "timestamp\n"])
def test_what_is_no_workload_is_said_so(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadRequest, match=r"columns|can be read"):
        read_workload(write(tmp_path, text))
    with pytest.raises(BadRequest):
        read_workload(str(tmp_path / "missing"))
