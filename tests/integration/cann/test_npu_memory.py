"""An instance's device memory, shared by its segments: real ACL calls on the driver double, two processes."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

from doubles.cann.control import CannHost, Fault, card_name
from support import acl, card_actions, npu_actions
from support.acl import CHUNK, AclError
from support.card_process import CardProcess, RemoteFailure
from support.npu_actions import Place, Shared
from weight_broker import multilinear
from weight_broker.digest import DigestAlgorithm, combine
from weight_broker.errors import InvalidArgument, PublishRefused
from weight_broker.layout import MemoryFormat
from weight_broker.memory.npu.kind import Segment, SegmentKind

SIZE = 4 << 20
StartProcess = Callable[..., CardProcess]


@pytest.fixture
def instance(start_process: StartProcess) -> CardProcess:
    """An inference process on card 0."""
    process = start_process()
    process.call(acl.set_device, 0)
    return process


@pytest.fixture
def card(start_process: StartProcess) -> CardProcess:
    """A card process of the broker, on card 0."""
    process = start_process()
    process.call(acl.set_device, 0)
    return process


def plain_segment(instance: CardProcess, size: int = SIZE) -> Segment:
    return Segment(instance.call(acl.malloc, size), size)


def chunked_segment(instance: CardProcess, chunks: int) -> tuple[Segment, list[int]]:
    base, handles = instance.call(card_actions.map_chunks, chunks, 0)
    return Segment(base, chunks * CHUNK, SegmentKind.VMM, CHUNK), handles


def import_all(card: CardProcess, shared: Shared) -> list[int]:
    """The addresses of the regions in the card process."""
    return [
        card.call(acl.import_key, region.export_key)
        if region.export_key
        else card.call(card_actions.map_shared, list(region.shareable_handles), 0)[0]
        for region in shared.regions
    ]


def test_every_tensor_is_found_at_its_place_bit_by_bit(
    cann_host: CannHost, instance: CardProcess, card: CardProcess
) -> None:
    first, second, (chunked, _) = plain_segment(instance), plain_segment(instance), chunked_segment(instance, 3)
    places = [
        Place("b.bf16", first.base + 512, (1000, 8)),
        Place("a.int8", first.base + 512 + 16000, (77,), "int8"),
        Place("scalar", second.base + SIZE - 4, (), "float32"),
        Place("nz", second.base, (3, 5), "float16", MemoryFormat.FRACTAL_NZ, padding=512 - 30),
        Place("across", chunked.base + CHUNK - 1000, (1000,), "float16"),
        Place("tied", first.base + 512, (1000, 8)),
        Place("view", first.base + 512 + 1600, (100, 8)),
        Place("empty", 0, (0, 4)),
    ]
    contents = {}
    for place in places:
        if place.name not in ("tied", "view", "empty"):
            size = npu_actions.tensors_of([place])[place.name].storage_bytes
            contents[place.name] = random.Random(place.name).randbytes(size)
            instance.call(acl.write, place.address, contents[place.name])
    contents["tied"], contents["view"] = contents["b.bf16"], contents["b.bf16"][1600:3200]

    shared = instance.call(npu_actions.share, "it", places, [second, chunked, first], [card.call(acl.bare_tgid)])
    assert sorted(region.size_bytes for region in shared.regions) == [SIZE, SIZE, 2 * CHUNK]
    assert {region.device_id for region in shared.regions} == {card_name(0)}
    addresses = import_all(card, shared)
    placed = dict(zip(shared.names, shared.placements, strict=True))
    for name, content in contents.items():
        region, offset = placed[name]
        assert card.call(acl.read, addresses[region] + offset, len(content)) == content, name
    assert placed["tied"] == placed["b.bf16"]
    assert cann_host.violations() == []


def test_a_segment_is_exported_once_however_many_tensors_and_publications_lie_in_it(
    cann_host: CannHost, instance: CardProcess
) -> None:
    plain, (chunked, _) = plain_segment(instance), chunked_segment(instance, 2)
    places = [Place(f"{index:03}", plain.base + 1024 * index, (512,)) for index in range(200)]
    places += [Place("chunked", chunked.base + 100, (50,))]
    one = instance.call(npu_actions.share, "one", places, [plain, chunked])
    two = instance.call(npu_actions.share, "two", places[100:], [plain, chunked])
    assert one.regions == two.regions
    assert len(one.regions) == 2
    assert instance.live == {"allocations": 1, "exports": 2, "mappings": 2, "physical_handles": 3, "reservations": 1}

    instance.call(npu_actions.unshare, "one")
    assert instance.live["exports"] == 2
    instance.call(npu_actions.unshare, "two")
    instance.call(npu_actions.unshare, "two")  # once more changes nothing
    assert instance.call(npu_actions.exports) == 0
    # There is no call that ends a shareable handle: it ends with its chunk, which the export does not keep any more.
    assert instance.live == {"allocations": 1, "exports": 1, "mappings": 2, "physical_handles": 2, "reservations": 1}
    instance.call(acl.free, plain.base)
    assert cann_host.violations() == []


def test_of_an_expandable_segment_only_the_chunks_that_hold_tensors_are_shared(instance: CardProcess) -> None:
    segment, _ = chunked_segment(instance, 6)
    places = [
        Place("a", segment.base + 10, (4,)),
        Place("b", segment.base + CHUNK + 6, (4,)),  # the chunk behind: the same region
        Place("c", segment.base + 4 * CHUNK, (CHUNK,)),  # two chunks, after a gap
    ]
    shared = instance.call(npu_actions.share, "it", places, [segment])
    assert [region.size_bytes for region in shared.regions] == [2 * CHUNK, 2 * CHUNK]
    assert shared.placements == ((0, 10), (0, CHUNK + 6), (1, 0))
    assert instance.live["exports"] == 4


@pytest.mark.parametrize("chunked", [False, True])
def test_only_the_card_processes_that_were_admitted_can_import(
    instance: CardProcess, card: CardProcess, start_process: StartProcess, chunked: bool
) -> None:
    segment = chunked_segment(instance, 1)[0] if chunked else plain_segment(instance)
    places = [Place("a", segment.base, (8,))]
    shared = instance.call(npu_actions.share, "it", places, [segment], [card.call(acl.bare_tgid)])
    replacement = start_process()
    replacement.call(acl.set_device, 0)
    with pytest.raises(AclError, match="whitelist"):
        import_all(replacement, shared)
    instance.call(npu_actions.admit, "it", replacement.call(acl.bare_tgid))
    import_all(replacement, shared)
    import_all(card, shared)


def test_any_process_may_import_if_that_is_asked_for(instance: CardProcess, card: CardProcess) -> None:
    segment, (chunked, _) = plain_segment(instance), chunked_segment(instance, 1)
    places = [Place("a", segment.base, (8,)), Place("b", chunked.base, (8,))]
    shared = instance.call(npu_actions.share, "it", places, [segment, chunked], any_process=True)
    assert len(import_all(card, shared)) == 2


def test_the_driver_ends_an_export_although_the_memory_is_imported(
    cann_host: CannHost, instance: CardProcess, card: CardProcess
) -> None:
    """So the end of an export says nothing of the importers: the broker's answer does."""
    segment = plain_segment(instance)
    shared = instance.call(npu_actions.share, "it", [Place("a", segment.base, (8,))], [segment], any_process=True)
    import_all(card, shared)
    instance.call(npu_actions.unshare, "it")
    assert instance.call(npu_actions.exports) == 0
    card.call(acl.close_key, shared.regions[0].export_key)
    instance.call(acl.free, segment.base)
    assert instance.live == {}


def test_after_its_end_a_segment_can_be_shared_again(
    cann_host: CannHost, instance: CardProcess, start_process: StartProcess
) -> None:
    segment, (chunked, _) = plain_segment(instance), chunked_segment(instance, 2)
    places = [Place("a", segment.base, (8,)), Place("b", chunked.base + CHUNK - 3, (8,))]
    for content in (b"one", b"two", b"six"):
        shared = instance.call(npu_actions.share, "it", places, [segment, chunked], any_process=True)
        card = start_process()
        card.call(acl.set_device, 0)
        instance.call(acl.write, segment.base, content)
        instance.call(acl.write, chunked.base + CHUNK - 3, content)
        addresses = import_all(card, shared)
        for region, offset in shared.placements:
            assert card.call(acl.read, addresses[region] + offset, 3) == content
        card.kill()
        instance.call(npu_actions.unshare, "it")
    assert cann_host.violations() == []


def test_a_fresh_chunk_at_the_same_address_gets_a_handle_of_its_own(instance: CardProcess, card: CardProcess) -> None:
    segment, handles = chunked_segment(instance, 1)
    places = [Place("a", segment.base, (8,))]
    pids = [card.call(acl.bare_tgid)]
    before = instance.call(npu_actions.share, "before", places, [segment], pids)
    instance.call(npu_actions.unshare, "before")
    instance.call(npu_actions.remap, segment.base, handles[0])
    after = instance.call(npu_actions.share, "after", places, [segment], pids)
    assert after.regions[0].shareable_handles != before.regions[0].shareable_handles
    assert after.regions[0].region_id != before.regions[0].region_id
    instance.call(acl.write, segment.base, b"fresh")
    assert card.call(acl.read, import_all(card, after)[0], 5) == b"fresh"


def test_what_a_stream_still_writes_is_waited_for(cann_host: CannHost, instance: CardProcess) -> None:
    segment, source = plain_segment(instance), instance.call(acl.malloc, SIZE)
    stream = instance.call(acl.create_stream)
    instance.call(card_actions.copy_async, segment.base, source, SIZE, stream)
    instance.call(npu_actions.share, "it", [Place("a", segment.base, (8,))], [segment])
    assert cann_host.violations() == []


@pytest.mark.parametrize(("visible", "device", "expected"), [("2,5", 1, card_name(4)), (None, 3, card_name(3))])
def test_the_card_is_named_by_its_physical_number(
    start_process: StartProcess, visible: str | None, device: int, expected: str
) -> None:
    process = start_process(visible=visible)
    process.call(acl.set_device, device)
    segment = plain_segment(process)
    places = [Place("a", segment.base, (8,), device=device)]
    process.call(acl.set_device, 0)  # the thread may be elsewhere
    shared = process.call(npu_actions.share, "it", places, [segment])
    assert shared.regions[0].device_id == expected
    assert process.call(npu_actions.current_device) == 0


# ---- what cannot be shared
def refused(instance: CardProcess, places: list[Place], *segments: Segment, **options: Any) -> str:
    """What the refusal says; it must leave nothing exported."""
    with pytest.raises(RemoteFailure) as caught:
        instance.call(npu_actions.share, "it", places, segments, **options)
    assert instance.call(npu_actions.exports) == 0
    last = str(caught.value).strip().splitlines()[-1]
    assert last.split(":")[0].rpartition(".")[2] in (PublishRefused.__name__, InvalidArgument.__name__)
    return last


def test_a_tensor_without_its_segment_is_refused(instance: CardProcess) -> None:
    segment = plain_segment(instance)
    places = [Place("in", segment.base, (8,)), Place("out", segment.end - 8, (8,))]
    assert "'out'" in refused(instance, places, segment)
    assert "only whole segments can be shared" in refused(instance, places)
    elsewhere = replace(segment, device_index=1)
    assert "none of the 0 known segments of device 0" in refused(instance, places, elsewhere)


def test_a_pool_that_sleeps_is_refused(instance: CardProcess) -> None:
    segment = replace(plain_segment(instance), sleeps=True)
    assert "without sleep mode" in refused(instance, [Place("a", segment.base, (8,))], segment)


def test_memory_that_is_not_made_of_pages_is_refused(instance: CardProcess) -> None:
    segment = plain_segment(instance, 1000)
    assert "whole pages" in refused(instance, [Place("a", segment.base, (8,))], segment)


@pytest.mark.parametrize(
    ("chunked", "version", "said"),
    [
        (False, "24.1.rc3", "25.0.rc1 is the oldest that can. Upgrade"),
        (True, "24.1.0", "25.3.rc1 is the oldest that can. Upgrade"),
        (True, "25.2.0", "expandable_segments:False, or upgrade"),
    ],
)
def test_a_driver_that_is_too_old_is_refused(instance: CardProcess, chunked: bool, version: str, said: str) -> None:
    segment = chunked_segment(instance, 1)[0] if chunked else plain_segment(instance)
    assert said in refused(instance, [Place("a", segment.base, (8,))], segment, driver_version=version)


def test_a_driver_that_is_new_enough_is_not_refused(instance: CardProcess) -> None:
    plain, (chunked, _) = plain_segment(instance), chunked_segment(instance, 1)
    places = [Place("a", plain.base, (8,))]
    instance.call(npu_actions.share, "plain", places, [plain], driver_version="25.0.RC1")
    places = [Place("a", chunked.base, (8,))]
    instance.call(npu_actions.share, "chunked", places, [chunked], driver_version="25.3.rc1.2")


@pytest.mark.parametrize("chunked", [False, True])
def test_what_the_driver_refuses_is_refused_in_its_own_words_and_undone(
    cann_host: CannHost, instance: CardProcess, chunked: bool
) -> None:
    good = plain_segment(instance)
    bad = chunked_segment(instance, 3)[0] if chunked else plain_segment(instance)
    first, second = sorted([good, bad], key=lambda segment: segment.base)
    places = [Place("a", first.base, (8,)), Place("b", second.base, (8,))]
    cann_host.inject(Fault.EXPORT_REFUSED, pid=instance.pid)
    said = refused(instance, places, good, bad)
    assert "the driver does not export this memory" in said
    cann_host.clear()
    instance.call(npu_actions.share, "it", places, [good, bad])


def test_a_segment_that_is_no_allocation_is_refused_by_the_driver_and_what_was_exported_before_it_is_undone(
    instance: CardProcess,
) -> None:
    one, two = sorted([plain_segment(instance), plain_segment(instance)], key=lambda segment: segment.base)
    longer = replace(two, size=2 * SIZE)
    said = refused(instance, [Place("a", one.base, (8,)), Place("b", two.base, (8,))], one, longer)
    assert "Is it a whole allocation" in said
    assert instance.live == {"allocations": 2}


def test_an_asynchronous_error_of_the_device_is_told_before_anything_is_shared(
    cann_host: CannHost, instance: CardProcess
) -> None:
    segment, source = plain_segment(instance), instance.call(acl.malloc, SIZE)
    stream = instance.call(acl.create_stream)
    cann_host.inject(Fault.ASYNC_ERROR, pid=instance.pid, times=1)
    instance.call(card_actions.copy_async, segment.base, source, SIZE, stream)
    assert "does not wait for the device" in refused(instance, [Place("a", segment.base, (8,))], segment)


def test_chunks_of_another_size_than_said_are_refused(instance: CardProcess) -> None:
    segment, _ = chunked_segment(instance, 2)
    places = [Place("a", segment.base, (3 * CHUNK // 4,))]  # 1.5 chunks
    assert "no mapped memory begins at" in refused(instance, places, replace(segment, chunk_bytes=CHUNK // 2))
    assert "chunk_bytes" in refused(instance, places, replace(segment, chunk_bytes=3 * CHUNK // 4))


@pytest.mark.parametrize("release", ["8.5", "9.0"])
@pytest.mark.parametrize("chunk", [CHUNK, 10 * CHUNK, 32 * CHUNK])
def test_the_driver_is_asked_for_the_size_of_chunks(release: str, chunk: int) -> None:
    with CannHost(release=release) as host, closing(CardProcess(host)) as instance:
        instance.call(acl.set_device, 0)
        base, _ = instance.call(card_actions.map_chunks, 2, 0, chunk)
        segment = Segment(base, 2 * chunk, SegmentKind.VMM)
        shared = instance.call(npu_actions.share, "it", [Place("a", base + chunk - 8, (8,))], [segment])
        assert (shared.regions[0].chunk_bytes, len(shared.regions[0].shareable_handles)) == (chunk, 2)
        assert host.violations() == []


# ---- digests
def test_digests_of_device_memory_are_those_of_the_same_bytes_anywhere(instance: CardProcess) -> None:
    segment = plain_segment(instance)
    content = random.Random(7).randbytes(SIZE)
    instance.call(acl.write, segment.base, content)
    places = [
        Place("a", segment.base + 2, (300, 1000)),
        Place("b", segment.base + 2, (300, 1000)),
        Place("c", segment.base + 600_010, (9,), "int8"),
        Place("d", 0, (0,)),
        Place("nz", segment.base, (3, 5), "float16", MemoryFormat.FRACTAL_NZ, padding=482),
    ]

    def expected(begin: int, size: int) -> int:
        blocks = [content[at : min(at + 524288, begin + size)] for at in range(begin, begin + size, 524288)]
        return combine(DigestAlgorithm.MULTILINEAR_64, [multilinear.digest(block) for block in blocks])

    values = (expected(2, 600_000), 0, expected(600_010, 9), 0, expected(0, 512))
    assert instance.call(npu_actions.digests, places) == values
    assert instance.call(npu_actions.digests_by_torch, places) == values


def test_exchanged_tensors_are_seen_in_the_digests(instance: CardProcess) -> None:
    segment = plain_segment(instance)
    instance.call(acl.write, segment.base, b"one" + b"two")
    one, two = Place("a", segment.base, (3,), "int8"), Place("b", segment.base + 3, (3,), "int8")
    right = instance.call(npu_actions.digests, [one, two])
    exchanged = instance.call(npu_actions.digests, [replace(one, name="b"), replace(two, name="a")])
    assert exchanged == right[::-1] != right


def test_a_model_of_5000_tensors_in_expandable_segments_is_shared_as_one_region(
    instance: CardProcess, card: CardProcess
) -> None:
    segment, _ = chunked_segment(instance, 200)
    step = segment.size // 5000 // 512 * 512
    places = [Place(f"{index:04}", segment.base + index * step, (step // 2,)) for index in range(5000)]
    shared = instance.call(npu_actions.share, "it", places, [segment], [card.call(acl.bare_tgid)])
    assert len(shared.regions) == 1
    assert [offset for _, offset in shared.placements] == [index * step for index in range(5000)]
