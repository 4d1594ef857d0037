"""The line of a finished request."""

import logging
import re

from penstock.core.errors import PeerLost
from penstock.core.types import FinishReason
from penstock.server.request_log import log_choice
from tests.server.asking import choice_of, output_of


def test_a_request_is_one_line(caplog):
    choice = choice_of()
    choice.take(output_of(choice, "abc", FinishReason.LENGTH))
    choice.first_ns, choice.last_ns = 12_000_001, 16_000_001
    choice.timeline.reserved_ns, choice.timeline.pulled_ns = 8_000_000, 8_250_000
    with caplog.at_level(logging.INFO, "penstock.requests"):
        log_choice(choice, None)
    (record,) = caplog.records
    assert record.getMessage() == (
        "cmpl-q-0 prompt=2 cached=3 output=3 finish=length ttft_ms=12.00 tpot_ms=2.000 "
        "workers=prefill-0->decode-0 transport=shm pull_bytes=4096 gb_per_s=0.02 spans=2 "
        "pull_ms=0.25"
    )


def test_what_was_not_moved_is_not_said_to_have_been(caplog):
    choice = choice_of()
    choice.take(output_of(choice, "abc", FinishReason.LENGTH))
    assert choice.timeline is not None
    choice.timeline.pull_bytes = 0
    with caplog.at_level(logging.INFO, "penstock.requests"):
        log_choice(choice, None)
    assert caplog.records[0].getMessage().endswith("workers=prefill-0->decode-0")


def test_a_request_without_tokens_says_so(caplog):
    choice = choice_of()
    with caplog.at_level(logging.INFO, "penstock.requests"):
        log_choice(choice, PeerLost("gone"))
    message = caplog.records[0].getMessage()
    assert re.search(r"output=0 finish=none ttft_ms=-1.00 .* workers=none error='gone'$", message)
