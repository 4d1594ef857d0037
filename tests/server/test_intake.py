"""From bodies to requests."""

import asyncio
import threading

import msgspec
import pytest

from penstock.core.errors import BadRequest, PromptTooLong, UnknownModel
from penstock.server.intake import Caller, Intake, Query
from penstock.server.schema import ChatCompletionRequest, ChatMessage, CompletionRequest
from penstock.server.settings import ServerSettings
from tests.server.double import byte_model

CALLER = Caller(arrived_ns=5, request_id="r1")
HELLO = [ChatMessage(role="user", content="hi")]


def _intake(**settings) -> Intake:
    return Intake(byte_model(), ServerSettings(**settings))


def _complete(caller: Caller = CALLER, intake: Intake | None = None, **fields) -> Query:
    return asyncio.run((intake or _intake()).completion(CompletionRequest(**fields), caller))


def _chat(**fields) -> Query:
    return asyncio.run(_intake().chat(ChatCompletionRequest(**fields), CALLER))


def test_every_parameter_arrives():
    query = _complete(
        model="alias", prompt="hi", max_tokens=9, min_tokens=2, temperature=0.5, top_p=0.25,
        top_k=7, min_p=0.125, repetition_penalty=1.5, presence_penalty=-1.0,
        frequency_penalty=2.0, logit_bias={"65": 5.0, "66": -100.0}, seed=11, stop=["x", "yz"],
        stop_token_ids=[65], ignore_eos=True, logprobs=3, cache_salt="tenant", priority=-4,
    )  # fmt: skip
    (request,) = query.requests
    params = request.params
    assert (request.request_id, request.prompt_token_ids) == ("cmpl-r1", (104, 105))
    assert (request.cache_salt, request.priority, request.arrived_ns) == ("tenant", -4, 5)
    assert (params.max_tokens, params.min_tokens, params.seed) == (9, 2, 11)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.25, 7, 0.125)
    assert (params.repetition_penalty, params.presence_penalty) == (1.5, -1.0)
    assert (params.frequency_penalty, params.logprobs) == (2.0, 3)
    assert params.logit_bias == ((65, 5.0), (66, -100.0))
    assert (params.stop, params.stop_token_ids, params.ignore_eos) == (("x", "yz"), (65,), True)
    assert query.model == "alias"


def test_loss_is_accepted_where_the_server_has_a_budget_and_the_body_does_not_object():
    def accepts(kv_quality: str | None, **settings) -> bool:
        (request,) = _complete(
            intake=_intake(**settings), prompt="hi", kv_quality=kv_quality
        ).requests
        return request.accepts_loss

    assert not accepts(None)
    assert not accepts("exact")
    assert accepts(None, accepts_loss=True)
    assert not accepts("exact", accepts_loss=True)


@pytest.mark.parametrize("field", ["kv_window", "kv_select"])
def test_a_part_of_the_kv_is_for_servers_that_may_lose_something(field: str):
    lossy = _intake(accepts_window=True)
    (asked,) = _complete(intake=lossy, prompt="hi", **{field: 64}).requests
    assert getattr(asked, field) == 64
    (whole,) = _complete(prompt="hi").requests
    assert getattr(whole, field) == 0
    with pytest.raises(BadRequest, match="--kv-quality") as refused:
        _complete(prompt="hi", **{field: 64})
    assert refused.value.field == field
    with pytest.raises(BadRequest, match="not exact"):
        _complete(intake=lossy, prompt="hi", kv_quality="exact", **{field: 64})
    with pytest.raises(BadRequest, match="not for both"):
        _complete(intake=lossy, prompt="hi", kv_window=64, kv_select=64)


def test_defaults_are_openais():
    (request,) = _complete(prompt="hi").requests
    params = request.params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (16, 1.0, 1.0, 0)
    assert (params.stop, params.logprobs, params.logit_bias) == ((), None, ())
    (request,) = _chat(messages=HELLO).requests
    assert request.params.max_tokens == 256 - len("u:hi\na:"), "a chat fills the window"
    (request,) = _complete(prompt="x" * 250).requests
    assert request.params.max_tokens == 6, "and nothing goes beyond it"


def test_a_seed_is_drawn_when_none_is_given():
    seeds = [_complete(prompt="hi").requests[0].params.seed for _ in range(4)]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_choices_of_a_prompt_count_seeds_and_ids():
    query = _complete(prompt=["a", "b"], n=3, seed=2**63 - 2)
    ids = [request.request_id for request in query.requests]
    assert ids == [f"cmpl-r1-{i}" for i in range(6)]
    assert [r.prompt_token_ids for r in query.requests] == [(97,)] * 3 + [(98,)] * 3
    seeds = [request.params.seed for request in query.requests]
    assert seeds == [2**63 - 2, 2**63 - 1, 0] * 2, "a prompt answers the same alone or in a list"
    assert query.prompt_tokens == 2


def test_negative_seeds_become_positive():
    assert _complete(prompt="hi", seed=-1).requests[0].params.seed == 2**63 - 1


def test_a_clients_own_id_may_come_twice():
    caller = Caller(arrived_ns=0, request_id="mine", is_own_id=True)
    first, second = (_complete(caller, prompt="hi").query_id for _ in range(2))
    assert first != second
    assert first.startswith("cmpl-mine-")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", [(104, 105)]),
        (["h", "i"], [(104,), (105,)]),
        ([104, 105], [(104, 105)]),
        ([[104], [105, 299]], [(104,), (105, 299)]),
    ],
)
def test_every_form_of_prompt(prompt, expected):
    assert [r.prompt_token_ids for r in _complete(prompt=prompt).requests] == expected


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [""]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": [[1], [300]]}, "prompt"),
        ({"prompt": ["a"] * 200}, "prompt"),
        ({"prompt": "a", "n": 129}, "n"),
        ({"prompt": ["a", "b"], "n": 65}, "n"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "logprobs"),
        ({"prompt": "a", "logit_bias": {"x": 1.0}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"300": 1.0}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"-1": 1.0}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"²": 1.0}}, "logit_bias"),
        ({"prompt": "a", "stop_token_ids": [300]}, "stop_token_ids"),
        ({"prompt": "a", "min_tokens": 17}, "min_tokens"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_what_the_model_cannot_do_is_refused(fields, field):
    with pytest.raises(BadRequest) as refused:
        _complete(**fields)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": "x" * 256}, "prompt"),
        ({"prompt": "x" * 5000}, "prompt"),
        ({"prompt": "x", "max_tokens": 256}, "max_tokens"),
    ],
)
def test_what_does_not_fit_the_window_says_so(fields, field):
    with pytest.raises(PromptTooLong, match="window") as refused:
        _complete(**fields)
    assert refused.value.field == field


def test_a_text_beyond_all_bounds_is_not_even_tokenised():
    intake = _intake()
    intake.model.tokenizer.encode_batch = None
    with pytest.raises(PromptTooLong, match="characters") as refused:
        _complete(intake=intake, prompt="x" * 10_000_000)
    assert refused.value.field == "prompt"


def test_the_whole_window_can_be_used():
    (request,) = _complete(prompt="x", max_tokens=255).requests
    assert request.params.max_tokens == 255


def test_the_newer_name_of_max_tokens_wins():
    query = _chat(messages=HELLO, max_tokens=3, max_completion_tokens=4)
    assert query.requests[0].params.max_tokens == 4
    with pytest.raises(PromptTooLong) as refused:
        _chat(messages=HELLO, max_completion_tokens=1000)
    assert refused.value.field == "max_completion_tokens"


def test_unknown_models_are_refused_and_absent_ones_are_ours():
    with pytest.raises(UnknownModel, match="served: tiny, alias"):
        _complete(prompt="a", model="gpt-5")
    assert _complete(prompt="a").model == "tiny"


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "tool", "content": "x"}, "messages[1].role"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[1].content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0].text"),
        ({"role": "assistant", "tool_calls": [1]}, "messages[1].tool_calls"),
    ],
)
def test_bad_messages_are_named(message, field):
    with pytest.raises(BadRequest) as refused:
        _chat(messages=[*HELLO, msgspec.convert(message, ChatMessage)])
    assert refused.value.field == field


def test_logprobs_of_chats():
    assert _chat(messages=HELLO, logprobs=True).requests[0].params.logprobs == 0
    assert _chat(messages=HELLO, logprobs=True, top_logprobs=4).requests[0].params.logprobs == 4
    assert _chat(messages=HELLO, logprobs=False).requests[0].params.logprobs is None
    with pytest.raises(BadRequest, match="top_logprobs"):
        _chat(messages=HELLO, top_logprobs=4)


def test_long_texts_are_tokenised_in_a_thread():
    intake = _intake(encode_inline_chars=10)
    tokenizer, seen = intake.model.tokenizer, []
    encode = tokenizer.encode_batch

    def watch(*args, **options):
        seen.append(threading.current_thread() is threading.main_thread())
        return encode(*args, **options)

    tokenizer.encode_batch = watch
    _complete(intake=intake, prompt="x" * 10)
    _complete(intake=intake, prompt="x" * 11)
    intake.close()
    assert seen == [True, False]


def test_how_long_kv_is_to_be_kept_goes_along_and_a_pin_needs_a_time():
    (request,) = _complete(prompt="hi", retention_ttl=1.5, cache_salt="t", kv_pin="docs").requests
    assert (request.retention_ns, request.pin_id) == (1_500_000_000, "t/docs")
    (request,) = _complete(prompt="hi").requests
    assert (request.retention_ns, request.pin) == (0, "")
    with pytest.raises(BadRequest, match="kv_pin"):
        _complete(prompt="hi", kv_pin="docs")
