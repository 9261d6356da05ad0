"""Layouts that were validated before, as many as there is room for."""

from __future__ import annotations

from weight_broker.layout import Layout, TensorSpec
from weight_broker.v1 import weight_set_pb2
from weight_broker.wire import layout_to_wire
from weight_brokerd.api.layouts import LayoutCache


def message(name: str, tensors: int) -> weight_set_pb2.Layout:
    return layout_to_wire(Layout([TensorSpec(f"{name}.{number}", "int8", (8,), (1,), 8) for number in range(tensors)]))


def test_the_same_message_gives_the_same_layout() -> None:
    cache = LayoutCache()
    assert cache.layout(message("one", 3)) is cache.layout(message("one", 3))


def test_at_most_so_many_layouts_are_kept_those_used_last() -> None:
    cache = LayoutCache(size=2, tensors=100)
    messages = {name: message(name, 1) for name in "abc"}
    for name in "abac":
        cache.layout(messages[name])
    assert [one.tensors[0].name for one in cache._layouts.values()] == ["a.0", "c.0"]


def test_at_most_so_many_tensors_are_kept_whatever_the_number_of_layouts() -> None:
    cache = LayoutCache(size=64, tensors=10)
    messages = {name: message(name, 4) for name in "abcd"}
    for one in messages.values():
        cache.layout(one)
        assert sum(map(len, cache._layouts.values())) <= 10
    large = message("large", 10)
    assert cache.layout(large) is cache.layout(large), "as many as there is room for"
    assert len(cache._layouts) == 1
    cache.layout(messages["a"])
    cache.layout(messages["b"])
    assert len(cache._layouts) == 2, "what was pushed out is not counted any more"


def test_a_layout_that_is_larger_than_the_room_pushes_nothing_out() -> None:
    cache = LayoutCache(size=64, tensors=10)
    small = cache.layout(message("small", 4))
    assert len(cache.layout(message("large", 11))) == 11
    assert cache.layout(message("small", 4)) is small
