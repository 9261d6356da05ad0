"""Layouts that were validated before, as many as there is room for."""

from __future__ import annotations

import gc

from weight_broker.layout import Layout, TensorSpec
from weight_broker.wire import layout_to_wire
from weight_brokerd.api.incoming.layouts import LayoutCache
from weight_brokerd.kinds.steps import at_once


def message(name: str, tensors: int) -> bytes:
    return layout_to_wire(
        Layout([TensorSpec(f"{name}.{number}", "int8", (8,), (1,), 8) for number in range(tensors)])
    ).SerializeToString()


def layout(cache: LayoutCache, wire: bytes) -> Layout:
    return at_once(cache.layout(wire, [(0, len(wire))]))


def test_the_same_message_gives_the_same_layout() -> None:
    cache = LayoutCache()
    assert layout(cache, message("one", 3)) is layout(cache, message("one", 3))


def test_equal_layouts_are_one_object_while_anything_has_it() -> None:
    cache = LayoutCache(size=1)
    one = layout(cache, message("one", 3))
    layout(cache, message("other", 3))  # pushes it out
    assert layout(cache, message("one", 3)) is one
    specs = [spec._replace(storage_offset=8) for spec in one]
    assert layout(cache, layout_to_wire(Layout(specs)).SerializeToString()) is one, "what a fingerprint leaves out"


def test_the_garbage_collector_does_not_look_at_the_tensors_of_a_layout() -> None:
    found = layout(LayoutCache(), message("one", 300))
    assert not any(gc.is_tracked(part) for spec in found for part in (spec, spec.shape, spec.stride))
    assert not gc.is_tracked(found.tensors)
    assert not gc.is_tracked(found.content_sizes)


def test_at_most_so_many_layouts_are_kept_those_used_last() -> None:
    cache = LayoutCache(size=2, tensors=100)
    messages = {name: message(name, 1) for name in "abc"}
    for name in "abac":
        layout(cache, messages[name])
    assert [one.tensors[0].name for one in cache._layouts.values()] == ["a.0", "c.0"]


def test_at_most_so_many_tensors_are_kept_whatever_the_number_of_layouts() -> None:
    cache = LayoutCache(size=64, tensors=10)
    messages = {name: message(name, 4) for name in "abcd"}
    for one in messages.values():
        layout(cache, one)
        assert sum(map(len, cache._layouts.values())) <= 10
    large = message("large", 10)
    assert layout(cache, large) is layout(cache, large), "as many as there is room for"
    assert len(cache._layouts) == 1
    layout(cache, messages["a"])
    layout(cache, messages["b"])
    assert len(cache._layouts) == 2, "what was pushed out is not counted any more"


def test_a_layout_that_is_larger_than_the_room_pushes_nothing_out() -> None:
    cache = LayoutCache(size=64, tensors=10)
    small = layout(cache, message("small", 4))
    assert len(layout(cache, message("large", 11))) == 11
    assert layout(cache, message("small", 4)) is small
