"""Our rule: what it counts, one thing at a time. Workers are H100s unless said otherwise."""

from msgspec.structs import replace

from penstock.core.block import root_hash
from penstock.core.events import SetRole
from penstock.core.messages import Assign, Cancel, Load, PullSample, StepSample
from penstock.core.types import NS_PER_MS, RequestId, WorkerId
from tests.control.story import Story

LONG = 3000


def make(*names: str, **settings: object) -> Story:
    return Story(*names, num_blocks=4096, policy="predicted", **settings)


def load(name: str, **samples: object) -> Load:
    return Load(
        worker_id=WorkerId(name),
        waiting=0,
        running=0,
        handing_off=0,
        free_blocks=(1,),
        cached_blocks=(1,),
        **samples,
    )


def test_a_long_prompt_crosses_and_a_short_one_is_not_worth_a_hand_off() -> None:
    story = make("p0", "d0")
    story.submit("long", LONG)
    assert story.pairs() == [("p0", "d0")]
    story = make("p0", "d0", "d1")
    story.submit("short", 3)
    assert story.pairs() == [("d0", "d0")]


def test_queues_are_counted() -> None:
    story = make("p0", "p1", "d0", "d1")
    for name in "abcd":
        story.submit(name, LONG)
    pairs = story.pairs()
    assert sorted(p for p, _ in pairs) == ["p0", "p0", "p1", "p1"]
    assert sorted(d for _, d in pairs) == ["d0", "d0", "d1", "d1"]


def test_a_prompt_goes_to_its_prefix_until_the_queue_there_is_longer_than_the_saving() -> None:
    story = make("p0", "p1", "d0", admit_backlog_ms=1e6)
    story.has_blocks("p1", 2000)
    chosen = []
    for number in range(8):
        story.submit(f"r{number}", LONG)
        chosen += [prefill for prefill, _ in story.pairs()]
    assert chosen[0] == "p1"
    assert "p0" in chosen[1:]


def test_a_later_turn_is_computed_where_its_prefix_decodes() -> None:
    story = make("p0", "d0", "d1")
    story.has_blocks("d1", 2992)
    story.submit("turn", LONG)
    assert story.pairs() == [("d1", "d1")]


def test_a_restarted_worker_has_no_prefix_any_more() -> None:
    story = make("p0", "p1", "d0")
    story.has_blocks("p1", 2000)
    story.lose("p1")
    story.join("p1", epoch=2)
    story.has_blocks("p1", 2000, epoch=1)  # said before it died
    story.submit("r", LONG)
    ((prefill, _),) = story.pairs()
    explained = story.controller.explain("r")
    assert prefill == "p0"
    assert {c.cached_tokens for c in explained.candidates} == {0}


def test_mixed_hardware_is_told_apart_by_what_it_reports() -> None:
    story = make("p0", "p1", "d0")
    for round_ in range(30):
        for name, speed in (("p0", 5), ("p1", 1)):
            new = 100 + 60 * round_
            took = int(speed * (4e6 + 15e3 * new))
            story.tell(load(name, step_samples=(StepSample(new, new * new, 0, 0, took),)))
    story.submit("r", LONG)
    assert [prefill for prefill, _ in story.pairs()] == ["p1"]
    story.submit("s", LONG)
    assert [prefill for prefill, _ in story.pairs()] == ["p1"]  # five times as fast


def test_the_transfer_is_that_of_the_pair() -> None:
    story = make("p0", "p1", "d0")
    for size in range(1, 30):
        for source, ns_per_byte in (("p0", 100), ("p1", 1)):
            sample = PullSample(WorkerId(source), size << 10, 1, 10**5 + (size << 10) * ns_per_byte)
            story.tell(load("d0", pull_samples=(sample,)))
    story.submit("r", LONG)
    assert story.pairs() == [("p1", "d0")]


def test_a_pair_within_a_host_is_found_among_workers_that_are_less_busy() -> None:
    story = make()
    for number in range(6):
        for role in "pd":
            story.join(f"{role}{number}", host=f"host-{number}")
    for size in range(1, 30):
        num_bytes = size << 12
        for source, ns_per_byte in (("p0", 1), ("p1", 1000)):
            sample = PullSample(WorkerId(source), num_bytes, 1, 10**5 + num_bytes * ns_per_byte)
            story.tell(load("d0", pull_samples=(sample,)))
    for number in range(3):  # d0 and others decode already: the best of either side are apart
        story.submit(f"short{number}", 3)
    for number in range(6):
        story.submit(f"r{number}", LONG)
    pairs = [pair for pair in story.pairs() if pair[0] != pair[1]]
    assert sorted(pairs) == [(f"p{number}", f"d{number}") for number in range(6)]


def test_the_tpot_budget_closes_a_worker_and_the_request_waits_for_it() -> None:
    story = make("p0", "d0", slo_tpot_ms=6.2)  # two sequences of this length on an H100, not three
    for name in "abcde":
        story.submit(name, LONG)
        assert all(decode == "d0" for _, decode in story.pairs())
    status = story.controller.status()
    assert status.queued > 0
    assert status.queued < 5
    before = status.queued
    story.offered("p0", "a")
    story.tokens("d0", "a", 1, is_last=True)
    assert story.controller.status().queued == before - 1


def test_an_own_tpot_counts_more_than_that_of_the_cluster() -> None:
    story = make("p0", "d0", slo_tpot_ms=1000.0)
    story.submit("a", LONG)
    story.submit("b", LONG, slo_tpot_ms=1.0)
    assert story.controller.status().queued == 1
    story.submit("c", LONG)  # waits behind it: turns are kept
    assert story.controller.status().queued == 2


def test_a_pool_that_is_spoken_for_is_full() -> None:
    story = Story("p0", "d0", num_blocks=16, policy="predicted")  # 256 tokens
    for name in "abc":
        story.submit(name, 100, max_tokens=20)
    assert story.controller.status().queued == 1
    story.offered("p0", "a")
    story.tokens("d0", "a", 1, is_last=True)
    assert story.controller.status().queued == 0


def test_a_pool_is_full_of_answers_that_turn_out_longer() -> None:
    story = Story("p0", "d0", num_blocks=64, policy="predicted")  # 1024 tokens
    story.submit("long", 100, max_tokens=900)
    story.offered("p0", "long")
    story.tokens("d0", "long", 1)
    story.submit("before", 100, max_tokens=200)
    assert len(story.heard(Assign)) == 2
    story.tell(Cancel(request_id=RequestId("before")))
    story.grow("d0", "long", 750)
    story.submit("after", 100, max_tokens=200)
    assert story.controller.status().queued == 1
    story.join("d1")
    assert story.pairs()[-1][1] == "d1"


def test_prompts_wait_at_the_controller_not_at_a_busy_worker() -> None:
    story = make("p0", admit_backlog_ms=50.0)
    story.join("d0", max_num_seqs=64)
    for number in range(20):
        story.submit(f"r{number}", LONG, max_tokens=2)
    assigned = len(story.heard(Assign))
    assert 4 <= assigned < 20
    story.join("p1")
    assert 4 <= len(story.heard(Assign)) < 20 - assigned


def test_a_turn_that_comes_soon_is_waited_for_rather_than_disturbing_a_decode_worker() -> None:
    story = make("p0", admit_backlog_ms=1.0)
    story.join("d0", max_num_seqs=64)
    for number in range(6):
        story.submit(f"r{number}", LONG)
    assert story.pairs() == [("p0", "d0")] * 4  # a fifth would find p0 free in 0.2 s
    assert story.controller.status().queued == 2


def test_what_has_waited_goes_to_a_decode_worker_as_far_as_its_steps_leave_time() -> None:
    def taken(usual_tpot_ms: float, waited_ms: int) -> list[tuple[str, str]]:
        story = make("p0", admit_backlog_ms=1.0, usual_tpot_ms=usual_tpot_ms)
        story.join("d0", max_num_seqs=64)
        for number in range(9):
            story.submit(f"r{number}", LONG)
        assert story.pairs() == [("p0", "d0")] * 4
        story.now_ns += waited_ms * NS_PER_MS
        story.tell(SetRole(worker_id=WorkerId("nobody"), role=None))
        return story.pairs()

    assert not taken(100.0, waited_ms=1)
    with_time, without = taken(100.0, waited_ms=400), taken(7.0, waited_ms=400)
    assert set(with_time) == set(without) == {("d0", "d0")}
    assert 5 > len(with_time) > len(without) == 1


def test_prompts_on_a_decode_worker_are_within_its_tpot_too() -> None:
    story = make("p0", "d0", slo_tpot_ms=20.0)
    story.has_blocks("d0", 1600)
    story.submit("a", 1700)
    assert story.pairs() == [("d0", "d0")]
    story = make("p0", "d0", slo_tpot_ms=7.0)
    story.has_blocks("d0", 1600)
    story.submit("first", 3, max_tokens=2)
    story.heard(Assign)
    story.submit("a", 1700, max_tokens=2)
    assert story.pairs() == [("p0", "d0")]


def test_without_pairs_whoever_there_is_serves_alone() -> None:
    for names in (("p0",), ("d0",), ("m0", "m1"), ("p0", "m0")):
        story = make(*names)
        story.submit("r", LONG)
        ((prefill, decode),) = story.pairs()
        assert prefill == decode


def test_the_same_events_give_the_same_choices() -> None:
    def run() -> list[tuple[str, str]]:
        story = make("p0", "p1", "d0", "d1", "m0")
        for number in range(30):
            story.submit(f"r{number}", 50 + number * 37 % 2000)
            if number % 3 == 2:
                story.now_ns += 5 * NS_PER_MS
        return story.pairs()

    assert run() == run()
    assert len(set(run())) > 3


def test_layouts_with_other_block_sizes_find_their_prefixes_too() -> None:
    story = make("p0", "d0")
    info = story.controller.workers[WorkerId("p0")].info
    other = replace(info, worker_id=WorkerId("p9"), layout=replace(info.layout, block_size=32))
    story.controller.fleet.join(other)
    tokens = tuple(range(200))
    assert story.controller.fleet.cached_tokens(tokens, root_hash("")).tolist() == [0, 0, 0]
    story.has_blocks("p0", 160)
    assert story.controller.fleet.cached_tokens(tokens, root_hash("")).tolist() == [160, 0, 0]


def learn_links(story: Story, **ns_per_byte: int) -> None:
    """Let decode workers report pulls of p0's blocks that took so long."""
    for size in range(1, 30):
        for name, each_ns in ns_per_byte.items():
            sample = PullSample(WorkerId("p0"), size << 10, 1, 10**5 + (size << 10) * each_ns)
            story.tell(load(name, pull_samples=(sample,)))


def test_a_decode_worker_whose_link_was_slow_once_is_not_left_empty() -> None:
    story = make("p0", "d0", "d1", usual_ttft_ms=2000.0, usual_tpot_ms=40.0)
    learn_links(story, d0=10, d1=150)
    chosen = []
    for number in range(8):
        name = f"r{number}"
        story.submit(name, LONG)
        ((prefill, decode),) = story.pairs()
        story.offered(prefill, name)
        story.tokens(decode, name, 1)
        chosen.append(decode)
    assert chosen[0] == "d0"
    assert 2 <= chosen.count("d1") <= 4


def test_what_is_on_its_way_goes_through_the_same_link_first() -> None:
    story = make("p0", "d0", "d1")
    learn_links(story, d0=1000, d1=1001)  # equal ones are told apart by rounding
    story.submit("a", LONG)
    story.submit("b", 2 * LONG)
    assert [decode for _, decode in story.pairs()] == ["d0", "d1"]
    fleet = story.controller.fleet
    assert [w.arriving_tokens for w in fleet] == [0, LONG, 2 * LONG]
    story.offered("p0", "a")
    story.tokens("d0", "a", 1)
    story.tell(Cancel(request_id=RequestId("b")))
    assert not fleet.arriving.any()
    crowded = fleet.workers[WorkerId("d1")]
    crowded.arriving_bytes = 1e9
    fleet.refresh(crowded)
    story.submit("c", LONG)  # d1 decodes nothing, yet
    assert story.pairs() == [("p0", "d0")]
