"""A copy between two cards is offered until a card refuses it; what it refuses, the datasystem moves."""

from __future__ import annotations

import pytest

from support.asynchronous import on_a_loop
from support.scripted_cards import ScriptedCards
from weight_broker.layout import Layout, TensorSpec
from weight_brokerd.cards.errors import CardLost, ImportRefused
from weight_brokerd.cards.messages import ImportRegion
from weight_brokerd.core.model import DataPlane as Shown
from weight_brokerd.core.model import FailureCause
from weight_brokerd.dataplane.datasystem import DatasystemPlane
from weight_brokerd.dataplane.peer_copy import PeerCopyPlane
from weight_brokerd.dataplane.plane import DataPlane, MoveFailed, Place, PlaneName, StagedBy, shown_as

SIZE = 4096
LAYOUT = Layout([TensorSpec("weight", "int8", (SIZE,), (1,), SIZE)])
STAGED = Place("npu", "npu:1", stage=StagedBy("second", "s"))


def place(name: str, card: str) -> Place:
    return Place("npu", card, (ImportRegion(name, SIZE, export_key="6b"),), ((0, 0),))


SOURCE, DESTINATION = place("source", "npu:0"), place("destination", "npu:1")


def scene() -> tuple[PeerCopyPlane, ScriptedCards]:
    cards = ScriptedCards("npu:0", "npu:1")
    return PeerCopyPlane(cards, DatasystemPlane(cards)), cards


async def move(plane: DataPlane, source: Place = SOURCE) -> None:
    await plane.move(LAYOUT, source, DESTINATION, timeout=10.0, peer="transfer-1")


async def refused(plane: PeerCopyPlane) -> DataPlane:
    """What is named instead."""
    with pytest.raises(MoveFailed) as failed:
        await move(plane)
    assert (failed.value.touched, failed.value.quiesced) == (False, True)
    assert failed.value.instead is not None
    return failed.value.instead


@on_a_loop
async def test_the_source_is_named_with_its_card_and_the_destination_is_the_cards_own() -> None:
    plane, cards = scene()
    await move(plane)
    assert cards.moved == ["copy"]
    assert {region.region_id: region.device_id for region in cards.imported} == {"source": "npu:0", "destination": ""}


@on_a_loop
async def test_what_the_card_refuses_the_datasystem_moves_and_the_pair_is_remembered() -> None:
    plane, cards = scene()
    cards.peers_refused = {"source"}
    instead = await refused(plane)
    assert instead.name is PlaneName.DATASYSTEM
    assert plane.reaches("npu:0", "npu:1")
    await move(instead)
    assert cards.moved == ["fetch"]
    assert not plane.reaches("npu:0", "npu:1")
    assert plane.reaches("npu:1", "npu:0")
    assert plane.reaches("npu:0", "npu:2")


@on_a_loop
async def test_a_source_that_nothing_can_read_says_nothing_about_its_card() -> None:
    plane, cards = scene()
    cards.peers_refused = {"source"}
    instead = await refused(plane)
    cards.failure = CardLost("the source is gone", touched=True)
    with pytest.raises(MoveFailed):
        await move(instead)
    assert plane.reaches("npu:0", "npu:1")


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(CardLost("507899", touched=True), id="once bytes moved"),
        pytest.param(ImportRefused("507899", "source"), id="while the driver holds the memory"),
    ],
)
@on_a_loop
async def test_no_other_plane_is_named_when_the_memory_may_have_changed(failure: CardLost | ImportRefused) -> None:
    plane, cards = scene()
    failure.quiesced = failure.touched
    cards.failure = failure
    with pytest.raises(MoveFailed) as failed:
        await move(plane)
    assert (failed.value.cause, failed.value.instead) == (FailureCause.SOURCE_UNREACHABLE, None)


@pytest.mark.parametrize(
    ("name", "source", "destination", "shown"),
    [
        (PlaneName.HOST, SOURCE, DESTINATION, Shown.LOCAL),
        (PlaneName.COPY, SOURCE, SOURCE, Shown.LOCAL),
        (PlaneName.PEER_COPY, SOURCE, DESTINATION, Shown.PEER_COPY),
        (PlaneName.DATASYSTEM, SOURCE, DESTINATION, Shown.DATASYSTEM),
        (PlaneName.STAGED, SOURCE, STAGED, Shown.DATASYSTEM),
        (PlaneName.STAGED, place("other", "npu:1"), STAGED, Shown.LOCAL),
    ],
)
def test_reports_say_what_carries_the_bytes(name: PlaneName, source: Place, destination: Place, shown: Shown) -> None:
    assert shown_as(name, source, destination) is shown
