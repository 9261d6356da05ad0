"""Memory that the card refuses to map is staged within the same call, if its owner offered to copy it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from support.asynchronous import on_a_loop
from support.kinds import RecordedEvents, ServingConnections, control_of, npu_kind
from support.scripted_cards import ScriptedCards
from weight_broker.errors import NotAttached, PublishRefused, Reason
from weight_broker.key import ParallelRank, WeightSetKey
from weight_broker.layout import Layout, TensorSpec
from weight_brokerd.attach.peer import PeerCredentials
from weight_brokerd.cards.messages import ImportRegion
from weight_brokerd.control.control import Control
from weight_brokerd.control.mailboxes import AcquisitionEvent, Granted, Mailbox, Moved
from weight_brokerd.core import decisions as decide
from weight_brokerd.core.answers import STAGE_INSTEAD
from weight_brokerd.core.model import Acquisition, Arrival, IfAbsent, RankOfGroup, TransferPath
from weight_brokerd.core.publications import Offer, Publication, PublicationState
from weight_brokerd.dataplane.plane import Place, StagedBy
from weight_brokerd.kinds.published import PublishedMemory
from weight_brokerd.kinds.registry import Kinds

LAYOUT = Layout([TensorSpec("weight", "int8", (4096,), (1,), 4096)])
CARDS = ("npu:0", "npu:1", "npu:2", "npu:3")
ARRIVAL = Arrival(4096, (), "full")


def key(rank: int) -> WeightSetKey:
    return WeightSetKey("model", rank=ParallelRank(tensor_parallel_rank=rank, tensor_parallel_size=2))


@dataclass
class Scene:
    """A broker with four cards."""

    control: Control
    cards: ScriptedCards
    staging: ServingConnections
    kinds: Kinds

    def attach(self, name: str, *, serves: bool = True) -> str:
        instance_id = self.control.sessions.attach(PeerCredentials(1, 0, 0, frozenset()), name, "").instance_id
        if serves:
            self.staging.instances.add(instance_id)
        return instance_id

    async def publish(
        self, name: str, card: str, rank: int = 0, *, group: str = "", both: bool = True
    ) -> tuple[Publication, str]:
        instance_id = self.attach(name)
        of_group = RankOfGroup(group, rank, 2) if group else None
        offer = Offer(key(rank), LAYOUT, instance_id, "npu", card, 0, name, rank=of_group)
        memory = PublishedMemory(place(name, card, instance_id if both else ""), b"")
        return await self.control.publishing.publish(offer, memory), instance_id

    def acquire(
        self, name: str, card: str, rank: int = 0, *, group: str = "", both: bool = True, staged: bool = False
    ) -> Mailbox:
        """`both`: the memory is mapped or staged; `staged`: only that; neither: only mapped."""
        instance_id = self.attach(name)
        now = self.control.loop.now()
        of_group = RankOfGroup(group, rank, 2, 50.0) if group else None
        acquisition = Acquisition(
            name,
            key(rank),
            LAYOUT,
            instance_id,
            IfAbsent.WAIT,
            "npu",
            card,
            TransferPath.COPY,
            begun_at=now,
            deadline=now + 60,
            rank=of_group,
        )
        destination = place(name, card, instance_id if both or staged else "")
        if staged:
            acquisition.path, destination = TransferPath.STAGED, destination.as_staged
        return self.control.acquiring.begin(acquisition, destination)

    def succeed(self, moved: Moved) -> None:
        self.control.acquiring.succeeded(moved.transfer.receiver_instance_id, moved.transfer.transfer_id, ARRIVAL)


def place(name: str, card: str, stage_owner: str = "") -> Place:
    """Mapped, and copied by its owner if there is one that offers it."""
    stage = StagedBy(stage_owner, name) if stage_owner else None
    return Place("npu", card, (ImportRegion(name, 4096, export_key="6b"),), ((0, 0),), stage)


async def scene(path: str = "auto") -> Scene:
    cards, staging = ScriptedCards(*CARDS), ServingConnections()
    control, kinds = control_of(npu_kind(cards, staging, RecordedEvents(), path), staging=staging)
    kinds.start()
    await kinds.ready("npu")
    return Scene(control, cards, staging, kinds)


async def events(mailbox: Mailbox, last: type[AcquisitionEvent]) -> list[AcquisitionEvent]:
    """Everything up to the first event of a type."""
    found: list[AcquisitionEvent] = []
    async with asyncio.timeout(10):
        while not found or not isinstance(found[-1], last):
            event = await mailbox.get()
            assert not isinstance(event, decide.Fail) or last is decide.Fail, event
            found.append(event)
    return found


@on_a_loop
async def test_a_publication_that_the_card_refuses_becomes_a_staged_one_in_the_same_call() -> None:
    host = await scene()
    host.cards.refused = {"source"}
    publication, instance_id = await host.publish("source", "npu:0")
    assert (publication.state, publication.is_staged) == (PublicationState.RESIDENT, True)
    mailbox = host.acquire("receiver", "npu:1")
    granted, *_, moved = await events(mailbox, Moved)
    assert isinstance(granted, Granted)
    assert isinstance(moved, Moved)
    assert moved.transfer.path is TransferPath.STAGED
    assert {asked for asked, _ in host.staging.asked} == {instance_id}, "the receiver's memory is mapped"
    await host.control.publishing.retract(instance_id, publication.publication_id)
    host.control.close()


@on_a_loop
async def test_a_publication_that_the_card_maps_needs_no_stage() -> None:
    host = await scene()
    publication, instance_id = await host.publish("source", "npu:0")
    assert (publication.state, publication.is_staged) == (PublicationState.RESIDENT, False)
    assert list(host.cards.registered) == ["source"]
    host.control.publishing.staging_lost(instance_id, "its stage connection has ended")
    assert publication.state is PublicationState.RESIDENT
    host.control.close()


@pytest.mark.parametrize("path", ["auto", "direct"])
@on_a_loop
async def test_a_publisher_that_offered_no_stage_is_told_to_ask_again_where_that_helps(path: str) -> None:
    host = await scene(path)
    host.cards.refused = {"source"}
    with pytest.raises(PublishRefused, match="507899") as refused:
        await host.publish("source", "npu:0", both=False)
    assert refused.value.metadata == {"device_id": "npu:0", **(STAGE_INSTEAD if path == "auto" else {})}
    assert host.control.counts().publications == 0
    host.control.close()


@on_a_loop
async def test_a_publisher_whose_stage_connection_ends_meanwhile_may_repeat_its_call() -> None:
    host = await scene()
    host.cards.refused = {"source"}
    instance_id = host.attach("holder")
    offer = Offer(key(0), LAYOUT, instance_id, "npu", "npu:0", 0, "request")
    publishing = asyncio.create_task(
        host.control.publishing.publish(offer, PublishedMemory(place("source", "npu:0", instance_id), b""))
    )
    await asyncio.sleep(0)
    host.staging.instances.clear()
    with pytest.raises(NotAttached) as lost:
        await publishing
    assert lost.value.lacks_stage
    assert host.control.counts().publications == 0
    host.control.close()


@pytest.mark.parametrize("both", [True, False], ids=["mapped or staged", "staged"])
@on_a_loop
async def test_a_receiver_whose_stage_connection_ends_before_a_byte_has_arrived_may_repeat_its_call(both: bool) -> None:
    host = await scene()
    await host.publish("source", "npu:0")
    if both:
        host.cards.refused = {"receiver"}
    mailbox = host.acquire("receiver", "npu:1", both=both, staged=not both)
    host.staging.instances.clear()
    *_, failed = await events(mailbox, decide.Fail)
    assert isinstance(failed, decide.Fail)
    assert isinstance(failed.error, NotAttached)
    assert (failed.error.lacks_stage, failed.error.touched, failed.error.quiesced) == (True, False, True)
    host.control.close()


@on_a_loop
async def test_a_receiver_whose_stage_connection_ends_while_it_copies_is_told_that_its_memory_is_touched() -> None:
    host = await scene()
    await host.publish("source", "npu:0")
    host.staging.gate = asyncio.Event()
    mailbox = host.acquire("receiver", "npu:1", both=False, staged=True)
    async with asyncio.timeout(10):
        await host.staging.is_asked_to_copy.wait()
    host.staging.cut_off()
    *_, failed = await events(mailbox, decide.Fail)
    assert isinstance(failed, decide.Fail)
    assert (failed.error.reason, failed.error.touched) == (Reason.TRANSFER_FAILED, True)
    host.control.close()


@pytest.mark.parametrize("card", ["npu:0", "npu:1"], ids=["same card", "another card"])
@on_a_loop
async def test_a_receiver_that_the_card_refuses_is_granted_again_with_the_staged_path(card: str) -> None:
    host = await scene()
    await host.publish("source", "npu:0")
    host.cards.refused = {"receiver"}
    first, second, moved = await events(host.acquire("receiver", card), Moved)
    assert isinstance(first, Granted)
    assert isinstance(second, Granted)
    assert isinstance(moved, Moved)
    assert first.transfer is second.transfer is moved.transfer
    assert moved.transfer.path is TransferPath.STAGED
    assert host.cards.buffers == set()
    host.succeed(moved)
    assert host.control.counts().running_transfers == 0
    host.control.close()


@on_a_loop
async def test_the_next_source_of_a_staged_receiver_is_staged_from_the_start() -> None:
    host = await scene()
    publication, _ = await host.publish("source", "npu:0")
    await host.publish("other", "npu:2")
    host.cards.refused, host.cards.gate = {"receiver"}, asyncio.Event()
    mailbox = host.acquire("receiver", "npu:1")
    async with asyncio.timeout(10):
        for _ in range(2):
            assert isinstance(await mailbox.get(), Granted)
    host.control.publishing.evict("", publication.publication_id)
    host.cards.gate.set()
    granted, moved = await events(mailbox, Moved)
    assert isinstance(granted, Granted)
    assert isinstance(moved, Moved)
    assert granted.transfer.publication.publication_id != publication.publication_id
    assert granted.transfer.path is moved.transfer.path is TransferPath.STAGED
    host.control.close()


@pytest.mark.parametrize("path", ["auto", "direct"])
@on_a_loop
async def test_a_receiver_that_offered_no_stage_is_told_to_ask_again_where_that_helps(path: str) -> None:
    host = await scene(path)
    await host.publish("source", "npu:0", both=False)
    host.cards.refused = {"receiver"}
    *_, failed = await events(host.acquire("receiver", "npu:1", both=False), decide.Fail)
    assert isinstance(failed, decide.Fail)
    assert failed.error.reason is Reason.TRANSFER_FAILED
    assert failed.error.metadata.get("path") == ("staged" if path == "auto" else None)
    assert (failed.error.touched, failed.error.quiesced) == (False, True)
    host.control.close()


@on_a_loop
async def test_all_ranks_of_an_engine_are_served_although_the_cards_refuse_their_memory() -> None:
    host = await scene()
    host.cards.refused = {"source 0", "receiver 1"}
    for rank in (0, 1):
        await host.publish(f"source {rank}", f"npu:{rank}", rank, group="sources")
    mailboxes = [host.acquire(f"receiver {rank}", f"npu:{rank + 2}", rank, group="receivers") for rank in (0, 1)]
    for mailbox in mailboxes:
        *_, moved = await events(mailbox, Moved)
        assert isinstance(moved, Moved)
        assert moved.transfer.path is TransferPath.STAGED
        host.succeed(moved)
    for mailbox in mailboxes:
        assert isinstance((await events(mailbox, decide.Complete))[-1], decide.Complete)
    host.control.close()
