"""Any input gives a value or the parser's own error: no other exception, no hang, no memory without bound."""

from __future__ import annotations

import pickle
import resource
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzzing.hostile import documents, mutated
from fuzzing.parsers import PARSERS, Parser, feed
from weight_broker.errors import InvalidArgument
from weight_broker.key import ParallelRank, Role, Stage, WeightSetKey
from weight_broker.transfers.exchange import MAX_TIMEOUT_SECONDS, checked_seconds

EXAMPLES = settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
MEMORY_BYTES = 1 << 30
"""More than any parser may need for what it is fed here."""


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.mark.parametrize("name", PARSERS)
def test_a_sample_is_accepted_or_the_parser_says_what_it_lacks(name: str) -> None:
    parser = PARSERS[name]
    assert parser.samples
    assert all(isinstance(feed(parser, sample), str) for sample in parser.samples)


@pytest.mark.parametrize("name", PARSERS)
def test_a_hostile_document_gives_a_value_or_the_parsers_own_error(name: str) -> None:
    parser, before = PARSERS[name], peak_bytes()
    for document in documents(parser):
        feed(parser, document)
    assert peak_bytes() - before < MEMORY_BYTES


@pytest.mark.parametrize("name", PARSERS)
@EXAMPLES
@given(data=st.data())
def test_mutated_bytes_give_a_value_or_the_parsers_own_error(name: str, data: st.DataObject) -> None:
    parser = PARSERS[name]
    feed(parser, data.draw(mutated(parser)))


def test_a_parser_that_raises_something_else_is_found() -> None:
    def broken(data: bytes) -> object:
        raise KeyError(data)

    with pytest.raises(KeyError):
        feed(Parser(broken, (ValueError,)), b"x")


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.binary(max_size=8),
    st.sampled_from(["\ud800", "x" * 5000, "\0", [], {}, object(), Role.DRAFT, Stage.RUNTIME, ParallelRank()]),
    st.dictionaries(st.text(max_size=5) | st.integers(), st.text(max_size=5) | st.none(), max_size=3),
)  # fmt: skip
FIELDS = tuple(name for name in WeightSetKey.__dataclass_fields__ if name != "model")


@EXAMPLES
@given(model=VALUES, others=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
def test_a_key_of_any_values_is_a_key_or_an_invalid_argument_that_names_the_field(
    model: object, others: dict[str, object]
) -> None:
    try:
        key = WeightSetKey(model, **others)  # type: ignore[arg-type]
    except InvalidArgument as error:
        wrong = error.field
    else:
        assert pickle.loads(pickle.dumps(key)) == key
        wrong = "key.none"
    assert wrong.startswith("key.")


@EXAMPLES
@given(sizes=st.lists(VALUES, min_size=8, max_size=8))
def test_a_rank_of_any_values_is_a_rank_or_an_invalid_argument(sizes: list[object]) -> None:
    try:
        ParallelRank(*sizes)  # type: ignore[arg-type]
    except InvalidArgument as error:
        wrong = error.field
    else:
        wrong = "rank.none"
    assert wrong.startswith("rank.")


HUGE = 10**5000
"""Python writes no integer of so many digits, and turns none into a float."""


def test_a_number_that_cannot_be_shown_is_an_invalid_argument() -> None:
    for make in (lambda: ParallelRank(HUGE), lambda: WeightSetKey("m", role=cast(Any, HUGE))):
        with pytest.raises(InvalidArgument, match="too large to show"):
            make()


def test_a_timeout_of_any_number_is_a_number_of_seconds_or_an_invalid_argument() -> None:
    assert checked_seconds("timeout", HUGE) == MAX_TIMEOUT_SECONDS
    for wrong in (-HUGE, 0, -1, float("nan"), float("inf"), True, "1", None):
        with pytest.raises(InvalidArgument, match="timeout"):
            checked_seconds("timeout", wrong)
