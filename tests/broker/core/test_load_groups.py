"""The ranks of one engine load all from peers or all from disk."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weight_broker.errors import BrokerError, LayoutMismatch, LoadGroupFailed, Reason, WeightsNotFound
from weight_broker.key import ParallelRank, WeightSetKey
from weight_broker.layout import Layout, TensorSpec
from weight_brokerd.core import decisions as decide
from weight_brokerd.core.coordinator import Coordinator
from weight_brokerd.core.load_groups import ENDED_GROUPS_REMEMBERED
from weight_brokerd.core.model import (
    Acquisition,
    Arrival,
    DataPlane,
    FailureCause,
    IfAbsent,
    Instance,
    Limits,
    RankOfGroup,
    TransferPath,
    WaitReason,
)
from weight_brokerd.core.publications import Offer, Publication
from weight_brokerd.core.sources import Holder
from weight_brokerd.directory.lease_table import LeaseTable

LAYOUT = Layout([TensorSpec("weight", "bfloat16", (4,), (1,), 8)])
OTHER_LAYOUT = Layout([TensorSpec("weight", "float16", (4,), (1,), 8)])
ARRIVAL = Arrival(8, (), "full")


def key(member: int, size: int = 2) -> WeightSetKey:
    return WeightSetKey("model", rank=ParallelRank(tensor_parallel_rank=member, tensor_parallel_size=size))


class Scene:
    """A coordinator, a directory that answers at once, and what each acquisition has been told."""

    def __init__(self, *, readers: int = 16) -> None:
        self.core = Coordinator(host_id="host", limits=Limits(readers_per_publication=readers))
        self.leases = LeaseTable()
        self.now = 0.0
        self.told: dict[str, list[Any]] = {}

    def attach(self, engine: str, size: int = 2) -> None:
        for member in range(size):
            self.core.attach(Instance(f"{engine}{member}", f"{engine}{member}", 1, 0, 0, 0.0))

    def publish(
        self,
        engine: str,
        member: int,
        *,
        layout: Layout = LAYOUT,
        token: int = 0,
        group: str = "",
        is_mapped: bool = True,
    ) -> Publication:
        rank = RankOfGroup(group or engine, member, 2)
        offer = Offer(key(member), layout, f"{engine}{member}", "cpu", "", token, f"{engine}{member}-{self.now}", rank)
        publication, _ = self.core.publish(offer, self.now)
        if is_mapped:
            self.follow(self.core.held(publication, self.now))
        return publication

    def publish_all(self, engine: str) -> list[Publication]:
        self.attach(engine)
        return [self.publish(engine, member) for member in range(2)]

    def acquire(
        self, engine: str, member: int, *, if_absent: IfAbsent = IfAbsent.LOAD, layout: Layout = LAYOUT, size: int = 2
    ) -> list[Any]:
        name = f"{engine}{member}"
        acquisition = Acquisition(
            acquisition_id=name,
            key=key(member),
            layout=layout,
            instance_id=name,
            if_absent=if_absent,
            device_kind="cpu",
            device_id="",
            path=TransferPath.COPY,
            begun_at=self.now,
            deadline=self.now + 100.0,
            rank=RankOfGroup(engine, member, size, assembly_seconds=10.0),
        )
        self.told[name] = []
        self.follow(self.core.acquire(acquisition, self.now))
        return self.told[name]

    def ask(self, engine: str, **options: Any) -> list[list[Any]]:
        self.attach(engine)
        return [self.acquire(engine, member, **options) for member in range(2)]

    def follow(self, decisions: Iterable[decide.Decision]) -> None:
        for decision in decisions:
            match decision:
                case decide.ClaimLease(weight_set_id, instance_id):
                    claim = self.leases.claim(weight_set_id, Holder("host", instance_id), now=self.now, seconds=900.0)
                    self.follow(self.core.lease_claimed(weight_set_id, claim, self.now))
                case decide.Reserve(transfer):
                    self.follow(self.core.reserved(transfer.transfer_id, DataPlane.LOCAL))
                case decide.ReleaseLease(lease):
                    if self.leases.release(lease):
                        self.follow(self.core.lease_ended(lease, self.now))
                case decide.Grant() | decide.Wait() | decide.LoadFromDisk() | decide.Complete() | decide.Fail():
                    self.told.setdefault(decision.acquisition_id, []).append(decision)

    def last(self, name: str) -> Any:
        return self.told[name][-1]

    def succeed(self, name: str) -> None:
        grant = next(one for one in reversed(self.told[name]) if isinstance(one, decide.Grant))
        self.follow(self.core.transfer_succeeded(grant.transfer.transfer_id, name, ARRIVAL, self.now))

    def fail(self, name: str, cause: FailureCause = FailureCause.SOURCE_UNREACHABLE, **options: Any) -> None:
        grant = next(one for one in reversed(self.told[name]) if isinstance(one, decide.Grant))
        self.follow(self.core.transfer_failed(grant.transfer.transfer_id, name, cause, "test", self.now, **options))

    def error(self, name: str) -> BrokerError:
        failed = self.last(name)
        assert isinstance(failed, decide.Fail), failed
        return failed.error


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_nothing_is_decided_before_all_ranks_have_asked(scene: Scene) -> None:
    scene.publish_all("a")
    scene.attach("b")
    scene.acquire("b", 0)
    assert scene.last("b0").reason is WaitReason.LOAD_GROUP
    scene.acquire("b", 1)
    assert all(isinstance(scene.last(f"b{member}"), decide.Grant) for member in range(2))


def test_nobody_is_done_before_all_have_every_byte(scene: Scene) -> None:
    scene.publish_all("a")
    scene.ask("b")
    scene.succeed("b0")
    assert scene.last("b0").reason is WaitReason.LOAD_GROUP
    scene.succeed("b1")
    assert all(isinstance(scene.last(f"b{member}"), decide.Complete) for member in range(2))
    assert not scene.core.acquisitions
    assert len(scene.core.groups) == 0


def test_all_ranks_read_from_one_engine(scene: Scene) -> None:
    """Rank 0 of engine a and rank 1 of engine c are resident: together they are no set."""
    scene.attach("a")
    scene.attach("c")
    scene.publish("a", 0)
    scene.publish("c", 1)
    scene.ask("b")
    assert all(isinstance(scene.last(f"b{member}"), decide.LoadFromDisk) for member in range(2))
    whole = scene.publish_all("d")
    scene.ask("e")
    assert [scene.last(f"e{member}").transfer.publication for member in range(2)] == whole


def test_one_engine_loads_and_the_others_wait_for_all_its_ranks(scene: Scene) -> None:
    scene.ask("a")
    tokens = [scene.last(f"a{member}").lease.fencing_token for member in range(2)]
    scene.ask("b")
    scene.ask("c")
    for name in ("b0", "b1", "c0", "c1"):
        assert scene.last(name).reason is WaitReason.COLD_LOAD
    scene.publish("a", 0, token=tokens[0])
    assert scene.last("b0").reason is WaitReason.COLD_LOAD
    scene.publish("a", 1, token=tokens[1])
    for name in ("b0", "b1", "c0", "c1"):
        assert isinstance(scene.last(name), decide.Grant)


def test_a_rank_that_cannot_be_served_sends_all_to_the_disk(scene: Scene) -> None:
    publications = scene.publish_all("a")
    scene.follow(scene.core.evict(publications[1].publication_id, scene.now)[1])
    scene.ask("b")
    assert all(isinstance(scene.last(f"b{member}"), decide.LoadFromDisk) for member in range(2))


def test_a_transfer_that_fails_sends_all_to_another_engine_or_to_the_disk(scene: Scene) -> None:
    scene.publish_all("a")
    second = scene.publish_all("c")
    scene.ask("b")
    scene.succeed("b0")
    scene.fail("b1")
    assert [scene.last(f"b{member}").transfer.publication for member in range(2)] == second
    scene.fail("b0", FailureCause.DIGEST_MISMATCH)
    scene.succeed("b1")
    assert all(isinstance(scene.last(f"b{member}"), decide.LoadFromDisk) for member in range(2))


def test_nobody_is_sent_to_the_disk_while_its_transfer_runs(scene: Scene) -> None:
    scene.publish_all("a")
    scene.ask("b")
    scene.fail("b0", FailureCause.RECEIVER)
    assert isinstance(scene.last("b1"), decide.Grant)
    scene.succeed("b1")
    assert isinstance(scene.error("b1"), LoadGroupFailed)
    assert "rank 0" in scene.error("b1").message
    assert len(scene.core.groups) == 0


def test_a_rank_that_dies_sends_the_others_to_the_disk_at_once(scene: Scene) -> None:
    scene.attach("b")
    scene.acquire("b", 0)
    scene.follow(scene.core.depart("b0", scene.now))
    scene.acquire("b", 1)
    assert isinstance(scene.error("b1"), LoadGroupFailed)


@pytest.mark.parametrize("resident", [True, False])
def test_ranks_that_never_ask_are_waited_for_as_long_as_the_caller_says(scene: Scene, resident: bool) -> None:
    if resident:
        scene.publish_all("a")
    scene.attach("b")
    scene.acquire("b", 0)
    assert scene.core.next_deadline() == 10.0
    scene.now = 10.0
    scene.follow(scene.core.advance(scene.now))
    assert "only ranks 0 of 2" in scene.error("b0").message
    assert isinstance(scene.acquire("b", 1)[-1].error, LoadGroupFailed)


def test_a_layout_that_differs_for_one_rank_is_told_to_that_rank(scene: Scene) -> None:
    scene.publish_all("a")
    scene.attach("b")
    scene.acquire("b", 0)
    scene.acquire("b", 1, layout=OTHER_LAYOUT)
    assert isinstance(scene.error("b1"), LayoutMismatch)
    assert isinstance(scene.error("b0"), LoadGroupFailed)


def test_a_matching_source_that_is_being_mapped_is_waited_for_although_another_layout_is_resident(
    scene: Scene,
) -> None:
    scene.attach("other")
    scene.attach("a")
    for member in range(2):
        scene.publish("other", member, layout=OTHER_LAYOUT)
    coming = [scene.publish("a", member, is_mapped=False) for member in range(2)]
    scene.ask("b")
    assert [scene.last(f"b{member}").reason for member in range(2)] == [WaitReason.REGISTERING] * 2
    for publication in coming:
        scene.follow(scene.core.held(publication, scene.now))
    assert [scene.last(f"b{member}").transfer.publication for member in range(2)] == coming


def test_busy_sources_are_waited_for_together() -> None:
    scene = Scene(readers=1)
    scene.publish_all("a")
    scene.ask("b")
    scene.ask("c")
    assert [scene.last(f"c{member}").reason for member in range(2)] == [WaitReason.SOURCES_BUSY] * 2
    scene.succeed("b0")
    assert scene.last("c0").reason is WaitReason.SOURCES_BUSY
    scene.succeed("b1")
    assert all(isinstance(scene.last(f"c{member}"), decide.Grant) for member in range(2))


@pytest.mark.parametrize("works", [True, False])
def test_an_engine_whose_last_rank_is_being_mapped_is_waited_for(scene: Scene, works: bool) -> None:
    scene.attach("a")
    scene.publish("a", 0)
    coming = scene.publish("a", 1, is_mapped=False)
    scene.ask("b")
    assert [scene.last(f"b{member}").reason for member in range(2)] == [WaitReason.REGISTERING] * 2
    if works:
        scene.follow(scene.core.held(coming, scene.now))
    else:
        scene.follow(scene.core.not_held(coming, scene.now))
    assert all(
        isinstance(scene.last(f"b{member}"), decide.Grant if works else decide.LoadFromDisk) for member in (0, 1)
    )


def test_who_will_not_load_is_told_that_nobody_holds_them(scene: Scene) -> None:
    scene.ask("b", if_absent=IfAbsent.WAIT)
    assert {type(scene.error("b0")), type(scene.error("b1"))} == {WeightsNotFound, LoadGroupFailed}


def test_an_engine_whose_leader_gives_up_is_followed_by_the_next(scene: Scene) -> None:
    scene.ask("a")
    leases = [scene.last(f"a{member}").lease for member in range(2)]
    scene.ask("b")
    for lease in leases:
        scene.follow([decide.ReleaseLease(lease)])
    assert all(isinstance(scene.last(f"b{member}"), decide.LoadFromDisk) for member in range(2))


def test_weights_that_cannot_be_published_are_waited_for_by_nobody(scene: Scene) -> None:
    scene.ask("a")
    scene.ask("b")
    lease = scene.last("a1").lease
    scene.follow(scene.core.declare_unpublishable(lease.weight_set_id, "they moved", scene.now))
    assert isinstance(scene.error("b1"), WeightsNotFound)
    assert "they moved" in scene.error("b1").message
    assert isinstance(scene.error("b0"), LoadGroupFailed)
    scene.ask("c")
    assert isinstance(scene.error("c1"), WeightsNotFound)


@pytest.mark.parametrize("rank", [RankOfGroup("b", 0, 2, 1.0), RankOfGroup("b", 2, 3, 1.0)], ids=["twice", "size"])
def test_a_rank_that_does_not_fit_is_refused_and_the_others_are_not_disturbed(scene: Scene, rank: RankOfGroup) -> None:
    scene.publish_all("a")
    scene.attach("b", 3)
    scene.acquire("b", 0)
    odd = Acquisition("odd", key(0), LAYOUT, "b2", IfAbsent.LOAD, "cpu", "", TransferPath.COPY, 0.0, 100.0, rank=rank)
    scene.follow(scene.core.acquire(odd, scene.now))
    assert scene.error("odd").reason is Reason.LOAD_GROUP_FAILED
    scene.acquire("b", 1)
    assert all(isinstance(scene.last(f"b{member}"), decide.Grant) for member in range(2))


def test_what_is_remembered_of_ended_groups_is_bounded(scene: Scene) -> None:
    for number in range(ENDED_GROUPS_REMEMBERED + 5):
        engine = f"e{number}-"
        scene.attach(engine)
        scene.acquire(engine, 0)
        scene.follow(scene.core.abandon(f"{engine}0", scene.now))
    assert len(scene.core.groups._ended) == ENDED_GROUPS_REMEMBERED


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["acquire", "succeed", "fail", "receiver", "die", "publish", "evict", "time", "release"]),
        st.integers(0, 3),
        st.integers(0, 1),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=300)
@given(EVENTS)
def test_whatever_happens_the_ranks_of_an_engine_are_told_the_same(events: list[tuple[str, int, int]]) -> None:
    """Never does one rank of an engine end with weights from a peer and another without, and nobody waits for ever."""
    scene = Scene(readers=1)
    engines = [f"e{number}-" for number in range(4)]
    for engine in engines:
        scene.attach(engine)
    dead: set[str] = set()

    def running(name: str) -> bool:
        return any(one.receiver_instance_id == name for one in scene.core.transfers.running.values())

    for event, number, member in events:
        name = f"{engines[number]}{member}"
        if name in dead:
            continue
        match event:
            case "acquire" if name not in scene.told:
                scene.acquire(engines[number], member)
            case "succeed" if running(name):
                scene.succeed(name)
            case "fail" if running(name):
                scene.fail(name)
            case "receiver" if running(name):
                scene.fail(name, FailureCause.RECEIVER)
            case "die":
                dead.add(name)
                scene.follow(scene.core.depart(name, scene.now))
            case "publish" if name in scene.told and isinstance(scene.last(name), decide.LoadFromDisk):
                scene.publish(engines[number], member, token=scene.last(name).lease.fencing_token)
            case "evict":
                for publication in scene.core.publications.of_instance(name):
                    scene.follow(scene.core.evict(publication.publication_id, scene.now)[1])
            case "release" if name in scene.told and isinstance(scene.last(name), decide.LoadFromDisk):
                scene.follow([decide.ReleaseLease(scene.last(name).lease)])
            case "time":
                scene.now += 4.0
                scene.follow(scene.core.advance(scene.now))
    # The end: transfers finish, and the time of all that wait is over.
    for name in list(scene.told):
        while name not in dead and running(name):
            scene.succeed(name)
    scene.now += 1000.0
    scene.follow(scene.core.advance(scene.now))
    for name in list(scene.told):
        while name not in dead and running(name):
            scene.succeed(name)
    scene.follow(scene.core.advance(scene.now + 1000.0))
    for engine in engines:
        ends = [scene.last(f"{engine}{member}") for member in range(2) if scene.told.get(f"{engine}{member}")]
        alive = [end for end in ends if end.acquisition_id not in dead]
        assert all(isinstance(end, decide.Complete | decide.LoadFromDisk | decide.Fail) for end in alive), alive
        kinds = {isinstance(end, decide.Complete) for end in ends if end.acquisition_id not in dead}
        assert len(kinds) <= 1, ends
    assert not scene.core.acquisitions
    assert len(scene.core.groups) == 0
