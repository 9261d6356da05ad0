"""Packed tensors do not lie over each other, and those that do are found however many there are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weight_broker.errors import InvalidArgument
from weight_brokerd.kinds.overlaps import Span, refuse_overlaps
from weight_brokerd.kinds.steps import at_once

SPANS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60), st.integers(1, 8)), max_size=12)


@given(SPANS)
def test_spans_that_share_a_byte_are_refused_and_no_others(spans: list[Span]) -> None:
    bytes_of = [(region, at) for region, offset, length in spans for at in range(offset, offset + length)]
    if len(bytes_of) == len(set(bytes_of)):
        at_once(refuse_overlaps(spans))
    else:
        with pytest.raises(InvalidArgument, match="do not overlap"):
            at_once(refuse_overlaps(spans))


def test_one_overlap_among_very_many_spans_is_found_in_any_order() -> None:
    spans = [(0, 8 * number, 8) for number in range(20_000)]
    spans.reverse()
    at_once(refuse_overlaps(spans))
    with pytest.raises(InvalidArgument):
        at_once(refuse_overlaps([*spans, (0, 8 * 777 + 4, 1)]))
