"""The options of the vLLM load format."""

from __future__ import annotations

from dataclasses import fields

import pytest

from weight_broker.errors import InvalidArgument
from weight_broker.integrations.engine.options import Options, parse


def test_without_options_everything_has_its_default() -> None:
    assert parse({}) == parse(None) == parse("") == Options()


def test_options_are_taken_as_an_object_or_as_json() -> None:
    expected = Options(timeout=5.0, strict=True, fallback_extra_config={"threads": 2})
    given = {"timeout": 5, "strict": True, "fallback_extra_config": {"threads": 2}}
    assert parse(given) == expected
    assert parse('{"timeout": 5, "strict": true, "fallback_extra_config": {"threads": 2}}') == expected


def test_an_unknown_option_is_named_with_all_that_there_are() -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse({"time_out": 3})
    assert "model_loader_extra_config['time_out']" in str(caught.value)
    assert "Did you mean timeout?" in str(caught.value)
    assert all(one.name in caught.value.metadata["expected"] for one in fields(Options))


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"timeout": 0}, "timeout"),
        ({"timeout": "5"}, "timeout"),
        ({"timeout": True}, "timeout"),
        ({"rank_timeout": float("nan")}, "rank_timeout"),
        ({"strict": 1}, "strict"),
        ({"stage": "final"}, "stage"),
        ({"engine_version": "any"}, "engine_version"),
        ({"runtime_directory": 7}, "runtime_directory"),
        ({"fallback_extra_config": []}, "fallback_extra_config"),
    ],
)
def test_a_wrong_value_is_refused_by_name(given: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse(given)
    assert caught.value.field == f"model_loader_extra_config[{field!r}]"


@pytest.mark.parametrize("given", ["{", "[]", 7], ids=["no-json", "no-object", "number"])
def test_what_is_no_object_of_options_is_refused(given: object) -> None:
    with pytest.raises(InvalidArgument, match="model_loader_extra_config"):
        parse(given)
