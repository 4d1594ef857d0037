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
    with caplog.at_level(logging.INFO, "penstock.requests"):
        log_choice(choice, None)
    (record,) = caplog.records
    assert record.getMessage() == (
        "cmpl-q-0 prompt=2 cached=3 output=3 finish=length ttft_ms=12.00 tpot_ms=2.000 "
        "workers=prefill-0->decode-0"
    )


def test_a_request_without_tokens_says_so(caplog):
    choice = choice_of()
    with caplog.at_level(logging.INFO, "penstock.requests"):
        log_choice(choice, PeerLost("gone"))
    message = caplog.records[0].getMessage()
    assert re.search(r"output=0 finish=none ttft_ms=-1.00 .* workers=none error='gone'$", message)
