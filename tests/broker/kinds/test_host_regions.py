"""Regions of host memory: what is taken, how long it is kept, and that nothing leaks."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from support.sealed_memory import ALL_SEALS, memfd, open_descriptors
from weight_broker.errors import BrokerError, InvalidArgument, Reason
from weight_brokerd.kinds.host.regions import RegionTable


@pytest.fixture
def table() -> Iterator[RegionTable]:
    before = open_descriptors()
    table = RegionTable(regions_per_instance=2)
    yield table
    table.close()
    assert open_descriptors() == before, "a descriptor leaked"


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def refusal_of(offer: Callable[[], None], descriptor: int) -> BrokerError:
    with pytest.raises(BrokerError) as caught:
        offer()
    assert not is_open(descriptor), "a refused descriptor stayed open"
    return caught.value


def test_an_offered_region_is_counted_and_belongs_to_the_table(table: RegionTable) -> None:
    table.offer("instance-1", "region", 7, memfd(b"weights"))
    assert (table.region_count, table.region_bytes) == (1, 7)
    assert table.size_bytes("instance-1", "region") == 7


def test_a_region_may_be_larger_than_declared(table: RegionTable) -> None:
    table.offer("instance-1", "region", 3, memfd(b"weights"))
    assert table.region_bytes == 7, "what counts is the memory that is there"


def test_memory_that_two_instances_share_counts_once(table: RegionTable) -> None:
    first = memfd(b"weights")
    again = os.dup(first)
    table.offer("instance-1", "region", 7, first)
    table.offer("instance-2", "region", 7, again)
    assert (table.region_count, table.region_bytes) == (2, 7)
    table.drop_instance("instance-1")
    assert (table.region_count, table.region_bytes) == (1, 7)
    table.drop_instance("instance-2")
    assert (table.region_count, table.region_bytes) == (0, 0)


def test_a_holder_gets_the_descriptors_of_its_regions_in_its_order(table: RegionTable) -> None:
    table.offer("instance-1", "a", 1, memfd(b"A"))
    table.offer("instance-1", "b", 1, memfd(b"B"))
    table.hold("transfer-1", "instance-1", ["b", "a"])
    assert [os.pread(table.descriptor("transfer-1", index), 1, 0) for index in (0, 1)] == [b"B", b"A"]
    with pytest.raises(InvalidArgument, match="region_index"):
        table.descriptor("transfer-1", 2)
    with pytest.raises(InvalidArgument, match="region_index"):
        table.descriptor("transfer-2", 0)


@pytest.mark.parametrize(
    ("seal", "name"),
    [
        (fcntl.F_SEAL_SEAL, "F_SEAL_SEAL"),
        (fcntl.F_SEAL_SHRINK, "F_SEAL_SHRINK"),
        (fcntl.F_SEAL_GROW, "F_SEAL_GROW"),
        (fcntl.F_SEAL_WRITE, "F_SEAL_WRITE"),
    ],
)
def test_a_memfd_without_one_of_the_seals_is_refused_by_name(table: RegionTable, seal: int, name: str) -> None:
    descriptor = memfd(seals=ALL_SEALS & ~seal)
    error = refusal_of(lambda: table.offer("instance-1", "region", 7, descriptor), descriptor)
    assert error.reason is Reason.REGION_REFUSED
    assert f"lacks the seals {name}. " in error.message


def test_a_memfd_that_is_too_small_is_refused_with_both_sizes(table: RegionTable) -> None:
    descriptor = memfd(b"weights")
    error = refusal_of(lambda: table.offer("instance-1", "region", 8, descriptor), descriptor)
    assert error.reason is Reason.REGION_REFUSED
    assert "it has 7 bytes, 8 are declared" in error.message


def test_a_file_that_only_looks_like_a_memfd_is_refused(table: RegionTable, tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "memfd:weights", os.O_RDWR | os.O_CREAT)
    error = refusal_of(lambda: table.offer("instance-1", "region", 0, descriptor), descriptor)
    assert error.reason is Reason.REGION_REFUSED
    assert "not a memfd" in error.message


@pytest.mark.parametrize("make", [lambda: os.pipe()[0], lambda: os.open("/dev/null", os.O_RDWR), lambda: 987_654])
def test_what_is_no_memory_at_all_is_refused(table: RegionTable, make: Callable[[], int]) -> None:
    descriptor = make()
    error = refusal_of(lambda: table.offer("instance-1", "region", 0, descriptor), descriptor)
    assert error.reason is Reason.REGION_REFUSED


@pytest.mark.parametrize("region_id", ["", "x" * 65])
def test_an_id_of_a_wrong_length_is_refused(table: RegionTable, region_id: str) -> None:
    descriptor = memfd()
    error = refusal_of(lambda: table.offer("instance-1", region_id, 7, descriptor), descriptor)
    assert error.reason is Reason.INVALID_ARGUMENT


def test_an_instance_gets_no_more_regions_than_the_limit(table: RegionTable) -> None:
    table.offer("instance-1", "a", 7, memfd())
    table.offer("instance-1", "b", 7, memfd())
    descriptor = memfd()
    error = refusal_of(lambda: table.offer("instance-1", "c", 7, descriptor), descriptor)
    assert error.reason is Reason.LIMIT_EXCEEDED
    assert "limits.regions_per_instance" in error.message
    table.offer("instance-2", "c", 7, memfd())


def test_the_same_offer_again_changes_nothing(table: RegionTable) -> None:
    original = memfd()
    again = os.dup(original)
    table.offer("instance-1", "region", 7, original)
    table.offer("instance-1", "region", 7, again)
    assert not is_open(again)
    assert (table.region_count, table.region_bytes) == (1, 7)


def test_other_memory_under_an_id_in_use_is_refused(table: RegionTable) -> None:
    table.offer("instance-1", "region", 7, memfd())
    descriptor = memfd()
    error = refusal_of(lambda: table.offer("instance-1", "region", 7, descriptor), descriptor)
    assert error.reason is Reason.INVALID_ARGUMENT
    table.offer("instance-2", "region", 7, memfd())


def test_a_withdrawn_region_is_closed_once_nobody_holds_it(table: RegionTable) -> None:
    table.offer("instance-1", "region", 7, memfd())
    table.hold("publication-1", "instance-1", ["region"])
    table.hold("transfer-1", "instance-1", ["region"])
    table.withdraw("instance-1", "region")
    table.release("publication-1")
    assert is_open(table.descriptor("transfer-1", 0))
    table.release("transfer-1")
    assert (table.region_count, table.region_bytes) == (0, 0)


def test_a_dead_instances_regions_stay_only_for_their_holders(table: RegionTable) -> None:
    table.offer("instance-1", "held", 7, memfd())
    table.offer("instance-1", "free", 7, memfd())
    table.hold("transfer-1", "instance-1", ["held"])
    table.drop_instance("instance-1")
    assert table.region_count == 1
    table.release("transfer-1")
    assert table.region_count == 0


def test_a_region_that_is_gone_can_neither_be_held_nor_withdrawn(table: RegionTable) -> None:
    table.offer("instance-1", "region", 7, memfd())
    table.drop_instance("instance-1")
    with pytest.raises(BrokerError, match="no region 'region'") as caught:
        table.hold("publication-1", "instance-1", ["region"])
    assert caught.value.reason is Reason.REGION_REFUSED
    with pytest.raises(BrokerError, match="no region 'region'"):
        table.withdraw("instance-1", "region")


def test_holding_several_regions_takes_all_or_none(table: RegionTable) -> None:
    table.offer("instance-1", "a", 7, memfd())
    with pytest.raises(BrokerError):
        table.hold("publication-1", "instance-1", ["a", "missing"])
    table.withdraw("instance-1", "a")
    assert table.region_count == 0


def test_a_holder_may_name_a_region_twice(table: RegionTable) -> None:
    table.offer("instance-1", "a", 7, memfd())
    table.hold("publication-1", "instance-1", ["a", "a"])
    table.withdraw("instance-1", "a")
    table.release("publication-1")
    assert table.region_count == 0


INSTANCES = st.sampled_from(["instance-1", "instance-2"])
REGIONS = st.sampled_from(["a", "b", "c"])
HOLDERS = st.sampled_from(["publication-1", "transfer-1", "transfer-2"])


class RegionTableMachine(RuleBasedStateMachine):
    """The table against a model of it: sets of references."""

    def __init__(self) -> None:
        super().__init__()
        self.before = open_descriptors()
        self.table = RegionTable(regions_per_instance=2)
        self.offered: set[tuple[str, str]] = set()
        self.held: dict[str, set[tuple[str, str]]] = {}

    def alive(self) -> set[tuple[str, str]]:
        return self.offered.union(*self.held.values())

    @rule(instance=INSTANCES, region=REGIONS)
    def offer(self, instance: str, region: str) -> None:
        of_instance = [one for one in self.alive() if one[0] == instance]
        try:
            self.table.offer(instance, region, 7, memfd())
        except BrokerError:
            assert (instance, region) in of_instance or len(of_instance) == 2
        else:
            assert (instance, region) not in of_instance
            self.offered.add((instance, region))

    @rule(holder=HOLDERS, instance=INSTANCES, regions=st.lists(REGIONS, max_size=3))
    def hold(self, holder: str, instance: str, regions: list[str]) -> None:
        wanted = {(instance, region) for region in regions}
        if holder in self.held:
            return
        try:
            self.table.hold(holder, instance, regions)
        except BrokerError:
            assert not wanted <= self.alive()
        else:
            assert wanted <= self.alive()
            self.held[holder] = wanted

    @rule(holder=HOLDERS)
    def release(self, holder: str) -> None:
        self.held.pop(holder, None)
        self.table.release(holder)

    @rule(instance=INSTANCES, region=REGIONS)
    def withdraw(self, instance: str, region: str) -> None:
        if (instance, region) in self.alive():
            self.table.withdraw(instance, region)
            self.offered.discard((instance, region))

    @rule(instance=INSTANCES)
    def drop(self, instance: str) -> None:
        self.table.drop_instance(instance)
        self.offered = {one for one in self.offered if one[0] != instance}

    @invariant()
    def exactly_what_is_referred_to_is_open(self) -> None:
        assert self.table.region_count == len(self.alive())
        assert self.table.region_bytes == 7 * len(self.alive())
        assert open_descriptors() - self.before == len(self.alive())

    def teardown(self) -> None:
        self.table.close()
        assert open_descriptors() == self.before


RegionTableMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnyOrderOfEvents = RegionTableMachine.TestCase
