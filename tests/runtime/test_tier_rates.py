"""What tiers give on this machine is measured, and nothing stays behind."""

from pathlib import Path

import pytest

from penstock.core.types import MIB
from penstock.runtime.settings import TierSettings
from penstock.runtime.tier_rates import disk_bytes_per_s, tier_bytes_per_s
from penstock.transport.cxl import BYTES_PER_S


def test_a_disk_is_measured_and_left_empty(tmp_path: Path):
    folder = tmp_path / "new"
    assert disk_bytes_per_s(folder) > MIB
    assert not list(folder.iterdir())
    tier = TierSettings(name="disk", num_bytes=MIB, path=str(folder))
    assert tier_bytes_per_s(tier) > MIB


def test_memory_is_measured_and_an_expander_is_no_faster_than_it_is_said_to_be():
    assert tier_bytes_per_s(TierSettings(name="dram", num_bytes=MIB)) > MIB
    assert MIB < tier_bytes_per_s(TierSettings(name="cxl", num_bytes=MIB)) <= BYTES_PER_S


def test_a_folder_that_cannot_be_written_is_an_error():
    with pytest.raises(FileNotFoundError):
        disk_bytes_per_s(Path("/proc/nowhere"))
