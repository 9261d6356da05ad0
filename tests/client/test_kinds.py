"""The one table of the kinds of memory."""

from __future__ import annotations

from weight_broker.kinds import TRAITS, MemoryKind, kind_of_wire
from weight_broker.v1 import weight_set_pb2 as pb


def test_every_kind_has_traits_and_every_kind_of_the_wire_a_name() -> None:
    assert set(TRAITS) == set(MemoryKind)
    named = {f"DEVICE_KIND_{name.upper()}": traits.wire_number for name, traits in TRAITS.items()}
    assert named == {name: number for name, number in pb.DeviceKind.items() if number}
    assert [kind_of_wire(traits.wire_number) for traits in TRAITS.values()] == list(TRAITS)
    assert kind_of_wire(pb.DEVICE_KIND_UNSPECIFIED) is None


def test_every_handle_of_a_region_belongs_to_one_kind() -> None:
    handles = [handle for traits in TRAITS.values() for handle in traits.handles]
    assert sorted(handles) == sorted(field.name for field in pb.Region.DESCRIPTOR.oneofs_by_name["handle"].fields)
