"""`bench/h200.py --dry-run`: prefill and decode as two processes. A file of its own, since it takes
long and files run side by side.
"""

import pytest

from tests.cluster.test_h200 import walk


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_prefill_and_decode_in_two_processes_is_walked(tmp_path):
    figures, outcomes = walk(tmp_path / "h200.json", "--only", "prefill and decode")
    assert set(outcomes.values()) == {"done"}, outcomes
    for key in ("stream_ttft", "whole_pull", "pull_rate", "exposed_share"):
        assert figures[f"two_workers_{key}"] > 0, key
