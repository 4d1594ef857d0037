import numpy as np
import pytest

from penstock.core.descriptors import RegionDescriptor
from penstock.core.events import Span
from penstock.transfer.plan import span_array
from penstock.transfer.region import Region, bounds_error, described_blocks


def test_a_region_knows_its_sizes():
    region = Region(np.zeros((5, 48), np.uint8))

    assert (region.num_blocks, region.block_bytes, region.capacity_bytes) == (5, 48, 240)


def test_a_region_whose_blocks_are_not_contiguous_is_a_bug():
    with pytest.raises(AssertionError):
        Region(np.zeros((5, 48), np.uint8)[:, ::2])


@pytest.mark.parametrize(
    "span",
    [
        Span(8, 0, 3),
        Span(0, 4, 2),
        Span(-1, 0, 1),
        Span(0, -1, 1),
        Span(0, 0, 0),
        Span(0, 0, -2),
        Span(2**62, 0, 2**62),
    ],
)
def test_a_span_outside_either_region_is_told(span):
    sizes = {"source_blocks": 10, "destination_blocks": 5}
    for good in ([Span(9, 4, 1)], [Span(9, 4, 1)] * 100):
        assert bounds_error(span_array(good), **sizes) is None
        assert "Span" in bounds_error(span_array([*good, span]), **sizes)


def test_a_descriptor_covers_whole_blocks():
    assert described_blocks(RegionDescriptor("shm", "", 1000, 300)) == 3
    assert described_blocks(RegionDescriptor("shm", "", 1000, 0)) == 0
