"""The Python API on the built-in model."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator

import psutil
import pytest

from penstock import LLM, SamplingParams
from penstock.core.errors import BadRequest, PromptTooLong, StartupFailed, WorkersUnavailable
from penstock.kv.quality import KvQuality

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leaks")]

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(dtype="float32") as llm:
        yield llm


def test_texts_and_token_ids_in_the_order_of_the_prompts(llm: LLM):
    prompts = ["Once upon a time", "def main():", "The"]
    as_texts = llm.generate(prompts, GREEDY)
    as_tokens = llm.generate([llm.tokenizer.encode(prompt) for prompt in prompts], GREEDY)
    for prompt, one, other in zip(prompts, as_texts, as_tokens, strict=True):
        assert one.prompt == prompt
        assert other.prompt is None
        assert one.token_ids == other.token_ids
        assert len(one.token_ids) == 12
        assert one.text == llm.tokenizer.decode(one.token_ids)
        assert one.finish_reason == "length"
        assert 0 < one.ttft_s <= one.latency_s
        parts = dict(one.ledger)
        assert sum(parts.values()) == pytest.approx(2 * parts["ttft"])
    assert llm.generate(prompts[0], GREEDY)[0].token_ids == as_texts[0].token_ids


def test_params_for_each_prompt(llm: LLM):
    each = [SamplingParams(max_tokens=n, ignore_eos=True, seed=n) for n in (1, 2, 3)]
    outputs = llm.generate(["a", "b", "c"], each)
    assert [len(output.token_ids) for output in outputs] == [1, 2, 3]
    assert llm.generate("c", each[2])[0].token_ids == outputs[2].token_ids
    with pytest.raises(BadRequest, match="2 sampling params for 1 prompts"):
        llm.generate("a", each[:2])


def test_without_a_seed_every_answer_is_another(llm: LLM):
    params = SamplingParams(max_tokens=30, temperature=1.5, ignore_eos=True)
    assert len({output.token_ids for output in llm.generate(["The"] * 5, params)}) == 5


def test_a_stop_string_ends_the_text_before_it(llm: LLM):
    whole = llm.generate("Once upon a time", GREEDY)[0]
    stop = whole.text[3:5]
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, stop=(stop,))
    output = llm.generate("Once upon a time", params)[0]
    assert output.text == whole.text[: whole.text.index(stop)]
    assert output.finish_reason == "stop"
    assert output.token_ids == whole.token_ids[: len(output.token_ids)]


def test_log_probabilities_when_asked_for(llm: LLM):
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True, logprobs=2)
    (output,) = llm.generate("The", params)
    assert len(output.logprobs) == len(output.token_ids) == 5
    for token_id, entry in zip(output.token_ids, output.logprobs, strict=True):
        assert len(entry.top) == 2
        assert entry.top[0] == (token_id, entry.logprob)  # greedy: the most likely one


def test_conversations(llm: LLM):
    one = [{"role": "user", "content": "Hello!"}]
    answers = llm.chat([one, one], GREEDY)
    assert len(answers) == 2
    assert answers[0].token_ids == llm.chat(one, GREEDY)[0].token_ids == answers[1].token_ids
    assert "Hello!" in (answers[0].prompt or "")


def test_what_does_not_fit_is_cut_or_refused(llm: LLM):
    window = llm.model.max_model_len
    (output,) = llm.generate([[7] * (window - 3)], GREEDY)
    assert len(output.token_ids) == 3
    with pytest.raises(PromptTooLong, match=f"the context window is {window} tokens"):
        llm.generate([[7] * window], GREEDY)
    with pytest.raises(BadRequest, match="empty"):
        llm.generate([[]], GREEDY)
    with pytest.raises(BadRequest, match="token ids are from 0 to 4095"):
        llm.generate([[4096]], GREEDY)
    assert llm.status().decoding == 0


def test_more_prompts_than_run_at_once(llm: LLM):
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    outputs = llm.generate([[10 + n % 50] for n in range(3000)], params, progress=False)
    by_prompt: dict[int, set[tuple[int, ...]]] = {}
    for output in outputs:
        by_prompt.setdefault(output.prompt_token_ids[0], set()).add(output.token_ids)
    assert all(len(tokens) == 1 for tokens in by_prompt.values())


def test_it_works_inside_a_running_loop_and_from_several_threads(llm: LLM):
    results: list[tuple[int, ...]] = []

    async def ask() -> None:
        results.append(llm.generate("The", GREEDY)[0].token_ids)

    threads = [threading.Thread(target=asyncio.run, args=(ask(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 4
    assert len(set(results)) == 1


def test_where_its_kv_blocks_are(llm: LLM):
    llm.generate([[11] * 100], GREEDY)
    residency = llm.kv_residency(limit=5)
    assert [worker.id for worker in residency.workers] == ["decode-0", "prefill-0"]
    assert residency.silent == []
    pools = [pool for worker in residency.workers for pool in worker.pools]
    assert len(pools) == 2
    assert all(pool.blocks == pool.active + pool.cached + pool.free for pool in pools)
    assert any(pool.cached for pool in pools)  # at both or at one: the router may spare a hand-off
    assert len(residency.blocks) == 5
    assert residency.next is not None
    name = residency.blocks[0].name
    assert name is not None
    copies = llm.kv_residency(limit=10, prefix=name).blocks
    assert {copy.name for copy in copies} == {name}
    with pytest.raises(BadRequest, match="hexadecimal"):
        llm.kv_residency(limit=1, prefix="what")


def test_prefixes_are_shared_among_those_of_one_salt(llm: LLM):
    prompt = [[50 + (3 * n) % 400 for n in range(200)]]

    def cached(**options: object) -> int:
        (output,) = llm.generate(prompt, GREEDY, **options)
        return output.cached_tokens

    assert cached(cache_salt="one", priority=3) == 0
    assert cached(cache_salt="one") > 128
    assert cached(cache_salt="another") == cached() == 0


def test_an_exact_cluster_refuses_what_leaves_kv_out(llm: LLM):
    exact, whole = (
        llm.generate("The", GREEDY, **asked)[0] for asked in ({"kv_quality": "exact"}, {})
    )
    assert exact.token_ids == whole.token_ids
    for name in ("kv_window", "kv_select"):
        with pytest.raises(BadRequest, match="--kv-quality") as refused:
            llm.generate("The", GREEDY, **{name: 64})
        assert refused.value.field == name


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"kv_quality": "good"}, "`kv_quality`: Invalid enum value 'good'"),
        ({"kv_window": 8}, "`kv_window`: Expected `int` >= 16"),
        ({"kv_pin": "system"}, "needs a `retention_ttl`"),
        ({"retention_ttl": -1.0}, "`retention_ttl`: Expected `float` >= 0.0"),
        ({"kv_windows": 64}, "unknown field `kv_windows`"),
        ({"priority": "high"}, "`priority`: Expected `int | null`"),
        ({"cache_salt": ""}, "`cache_salt`: Expected `str` of length >= 1"),
    ],
)
def test_what_is_asked_is_refused_as_in_a_body(llm: LLM, asked, message):
    with pytest.raises(BadRequest, match=message):
        llm.generate("The", GREEDY, **asked)
    with pytest.raises(BadRequest, match=message):
        llm.chat([{"role": "user", "content": "Hello!"}], GREEDY, **asked)


def test_a_window_a_selection_and_what_is_kept_of_the_kv():
    prompt = [[50 + (7 * n) % 400 for n in range(300)]]
    options = {"kv_quality": KvQuality(0.01)}
    with LLM(prefill=0, decode=0, mixed=1, dtype="float32", cluster_options=options) as lossy:

        def answer(**asked: object) -> tuple[int, ...]:
            (output,) = lossy.generate(prompt, GREEDY, **asked)
            return output.token_ids

        whole = answer()
        assert answer(kv_quality="exact") == answer(kv_window=4096) == whole
        assert answer(kv_window=16) != whole
        assert answer(kv_select=64) != whole
        with pytest.raises(BadRequest, match="not exact"):
            answer(kv_window=64, kv_quality="exact")
        with pytest.raises(BadRequest, match="not for both"):
            answer(kv_window=64, kv_select=64)

        def retained() -> int:
            (worker,) = lossy.kv_residency().workers
            return worker.pools[0].retained

        answer(kv_pin="system", retention_ttl=600)
        assert retained() == (300 + 12) // 32
        answer(kv_pin="system", retention_ttl=0)
        assert retained() == 0


def test_a_model_that_is_missing_is_explained():
    with pytest.raises(StartupFailed, match="no such folder"):
        LLM("/no/such/model")


def test_a_closed_one_says_so_and_its_processes_are_gone():
    llm = LLM(cluster_options={"executor": "instant"})
    workers = [worker.info.pid for worker in llm.status().workers]
    assert all(map(psutil.pid_exists, workers))
    llm.close()
    llm.close()
    assert not any(map(psutil.pid_exists, workers))
    with pytest.raises(WorkersUnavailable, match="closed"):
        llm.generate("x")


def test_the_end_of_the_program_is_the_end_of_its_cluster():
    code = (
        "from penstock import LLM\n"
        "llm = LLM(cluster_options={'executor': 'instant'})\n"
        "print(*(worker.info.pid for worker in llm.status().workers))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""
    assert not any(psutil.pid_exists(int(pid)) for pid in done.stdout.split())


def test_importing_penstock_is_light():
    code = "import sys, penstock; print({'numpy', 'torch', 'asyncio'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout == "set()\n", done.stderr
