"""Both halves: what instances export with `weight_broker.memory.npu.kind`, and what card processes do with it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from doubles.cann.control import CannHost, card_name
from support import acl, card_actions, npu_actions
from support.acl import CHUNK
from support.card_process import CardProcess
from support.cards import CardScene, move
from support.npu_actions import Place, Shared
from weight_broker.layout import MemoryFormat
from weight_broker.memory.npu.kind import Segment, SegmentKind, describe_device
from weight_broker.v1 import weight_set_pb2 as pb
from weight_brokerd.cards.errors import CardRefused
from weight_brokerd.cards.messages import ImportRegion
from weight_brokerd.cards.offers import OfferEnd, fresh_key
from weight_brokerd.cards.plan import pieces as plan
from weight_brokerd.cards.plan.blobs import BlobList
from weight_brokerd.kinds.npu.place import import_region
from weight_brokerd.kinds.npu.supervisor import CardSupervisor

MIB = 1 << 20

pytestmark = pytest.mark.timeout(60)


class Instance:
    """An inference process with a plain segment and an expandable one."""

    def __init__(self, process: CardProcess, card: int, shift: int) -> None:
        self.process, self.card = process, card_name(card)
        process.call(acl.set_device, card)
        plain = Segment(process.call(acl.malloc, 8 * MIB), 8 * MIB)
        base, _ = process.call(card_actions.map_chunks, 4, card)
        self.segments = [plain, Segment(base, 4 * CHUNK, SegmentKind.VMM, CHUNK)]
        self.places = [
            Place("embedding", plain.base + shift, (2 * MIB,), device=card),
            Place("head", plain.base + shift, (2 * MIB,), device=card),
            Place("bias", plain.base + 6 * MIB + shift, (77,), "float32", device=card),
            Place("nz", base + shift, (3, 5), "float16", MemoryFormat.FRACTAL_NZ, padding=512 - 30, device=card),
            Place("across", base + CHUNK - 4096 + shift, (MIB,), device=card),
        ]
        self.layout = describe_device(npu_actions.tensors_of(self.places)).layout

    def fill(self, byte: int) -> None:
        """Every tensor with bytes that go up from `byte`."""
        for number, place in enumerate(self.places):
            size = npu_actions.tensors_of([place])[place.name].storage_bytes
            content = (bytes((byte + number + step) % 256 for step in range(251)) * (size // 251 + 1))[:size]
            self.process.call(acl.write, place.address, content)

    def share(self, name: str, places: list[Place]) -> Shared:
        """Exports to every process, as published memory is."""
        return self.process.call(npu_actions.share, name, places, self.segments, any_process=True)

    def digests(self) -> tuple[int, ...]:
        """Of every tensor."""
        return self.process.call(npu_actions.digests, self.places)


def requests(prefix: str, shared: Shared) -> list[ImportRegion]:
    """The regions, as they come over the wire."""
    found = []
    for region in shared.regions:
        message = pb.Region(region_id=region.region_id, size_bytes=region.size_bytes, device_id=region.device_id)
        if region.export_key:
            message.npu_allocation.export_key = region.export_key
        else:
            message.npu_segment.shareable_handles.extend(region.shareable_handles)
            message.npu_segment.chunk_bytes = region.chunk_bytes
        if region.container_device is not None:
            message.container_device = region.container_device
        found.append(import_region("region", f"{prefix}/{region.region_id}", message))
    return found


@pytest.mark.parametrize("destination_card", [1, 0], ids=["another card", "the same card"])
def test_what_one_instance_exports_fills_what_another_exports(scene: CardScene, destination_card: int) -> None:
    source, destination = Instance(scene.start_process(), 0, 0), Instance(scene.start_process(), destination_card, 1024)
    source.fill(1)
    destination.fill(100)
    exports = {"source": source.share("it", source.places), "destination": destination.share("it", destination.places)}
    given, taken = (requests(name, shared) for name, shared in exports.items())
    pieces = plan.pieces(source.layout, exports["source"].placements, exports["destination"].placements)
    ids = [tuple(region.region_id for region in side) for side in (given, taken)]

    async def scenario(cards: CardSupervisor) -> None:
        for region in given:
            await cards.register(source.card, region)
        for sent, received in plan.rounds(pieces):
            blobs, filled = BlobList(ids[0], sent), BlobList(ids[1], received)
            if source.card == destination.card:
                await cards.copy(source.card, blobs, filled, [*given, *taken], timeout=20)
                continue
            key = fresh_key()
            await cards.offer(source.card, key, blobs)
            await cards.fetch(destination.card, key, filled, taken, timeout=20)
            await cards.withdraw(source.card, key, OfferEnd.DELIVERED)
        assert destination.digests() == source.digests()
        destination.process.call(npu_actions.unshare, "it")  # refused while anybody has it open
        for region in given:
            await cards.unregister(source.card, region.region_id)
        source.process.call(npu_actions.unshare, "it")

    scene.run(scenario)


def test_publications_of_one_instance_that_share_segments_and_chunks_come_and_go_one_by_one(scene: CardScene) -> None:
    instance = Instance(scene.start_process(), 0, 0)
    whole = requests("whole", instance.share("whole", instance.places))
    part = requests("part", instance.share("part", instance.places[:1] + instance.places[3:4]))
    assert {len(region.shareable_handles) for region in whole + part} == {0, 1, 2}

    async def scenario(cards: CardSupervisor) -> None:
        for region in whole + part:
            await cards.register(card_name(0), region)
        for regions in (whole, part):
            for region in regions:
                await cards.unregister(card_name(0), region.region_id)
            if regions is whole:
                for region in part:  # still there
                    every = BlobList((region.region_id,), plan.rounds([plan.Piece(0, 0, 0, 0, MIB)])[0].source)
                    await cards.offer(card_name(0), fresh_key(), every)
        pid = cards.health[0].sender_pid
        assert not {"imports", "mappings", "reservations"} & set(scene.host.live(pid))

    scene.run(scenario)


@pytest.mark.parametrize("chunks", [False, True], ids=["plain allocations", "chunks"])
def test_a_region_that_names_the_card_of_its_process_needs_no_peer_access(scene: CardScene, chunks: bool) -> None:
    """The runtime refuses a card peer access to itself."""
    source, destination = scene.own(0, 2 * MIB, seed=3, chunks=chunks), scene.own(1, 2 * MIB, chunks=chunks)

    async def scenario(cards: CardSupervisor) -> None:
        await cards.register(source.card, replace(source.region, device_id=source.card))
        await move(cards, source, destination)

    scene.run(scenario)
    assert destination.digest() == source.digest()


def test_chunks_of_a_container_that_counts_the_cards_otherwise_are_refused_and_keys_are_not(scene: CardScene) -> None:
    """The driver would take their handles for those of another card's chunks, which may exist."""
    elsewhere = scene.start_process(container=[CannHost.physical(0)], visible="")
    places = Instance(elsewhere, 0, 0)
    regions = requests("it", places.share("it", places.places))
    chunks = [region for region in regions if region.shareable_handles]
    keys = [region for region in regions if region.export_key]
    assert {region.container_device for region in chunks} == {0}

    async def scenario(cards: CardSupervisor) -> None:
        for region in keys:
            await cards.register(card_name(0), region)
        for region in chunks:
            with pytest.raises(CardRefused, match=r"container of the instance counts this card as 0, .* as 1"):
                await cards.register(card_name(0), region)

    scene.run(scenario)
