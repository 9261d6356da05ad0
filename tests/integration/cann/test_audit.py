"""Three functions that an audit of the sources once found too kind in the double, and that broke a third of the tests
when they were made strict: in front of the double as it is, they change nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from doubles.cann.build import ALIASES, LIBRARY, SOURCES
from doubles.cann.control import CannHost, card_name
from doubles.compiling import compile_library, compiled
from support import acl, card_actions, npu_actions
from support.acl import AclError
from support.card_process import CardProcess
from support.npu_actions import Place
from weight_broker.memory.device.tensor import Segment, SegmentKind

DOUBLE = "libdouble.so"
LOGICAL, CHUNK, ADMIT = "aclrtGetLogicDevIdByUserDevId", "aclrtMallocPhysical", "aclrtMemSetPidToShareableHandle"


def faithful_libraries() -> Path:
    """The double's libraries behind the three functions."""

    def fill(directory: Path) -> None:
        compile_library(sorted(SOURCES.glob("*.c")), directory / DOUBLE, "-DCANN_RELEASE=850")
        front = directory / LIBRARY
        compile_library([SOURCES / "audit/faithful.c"], front, "-Wl,--no-as-needed", str(directory / DOUBLE))
        for alias in ALIASES:
            (directory / alias).symlink_to(DOUBLE)

    return compiled("CANN-faithful", SOURCES, fill)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """What the three functions and the double have answered."""
    return tmp_path / "faithful"


@pytest.fixture
def start(cann_host: CannHost, start_process: Callable[..., CardProcess], log: Path) -> Callable[..., CardProcess]:
    """Starts processes that have the three functions in front of the double."""
    variables = {"LD_LIBRARY_PATH": str(faithful_libraries()), "FAITHFUL_LOG": str(log)}
    return lambda **options: start_process(environment=variables, **options)


def answers(log: Path) -> set[tuple[str, str]]:
    return {(name, verdict) for name, verdict in map(str.split, log.read_text().splitlines())}


def test_instances_share_plain_memory_and_chunks_twice_and_the_card_has_its_name(
    start: Callable[..., CardProcess], cann_host: CannHost, log: Path
) -> None:
    instance, card = start(visible="2,5"), start(visible="2,5")
    for process in (instance, card):
        process.call(acl.set_device, 1)
    plain = Segment(instance.call(acl.malloc, acl.CHUNK), acl.CHUNK, device_index=1)
    base, _ = instance.call(card_actions.map_chunks, 2, 1)
    chunks = Segment(base, 2 * acl.CHUNK, SegmentKind.VMM, acl.CHUNK, device_index=1)
    places = [Place("a", plain.base, (8,), device=1), Place("b", chunks.base, (8,), device=1)]
    for content in (b"one", b"two"):
        instance.call(acl.write, chunks.base, content)
        shared = instance.call(npu_actions.share, "it", places, [plain, chunks], any_process=True)
        assert {region.device_id for region in shared.regions} == {card_name(4)}
        handle = next(region.shareable_handles[0] for region in shared.regions if region.shareable_handles)
        chunk = card.call(acl.import_chunk, handle, 1)
        at = card.call(acl.reserve, acl.CHUNK)
        card.call(acl.map_chunk, at, acl.CHUNK, chunk)
        assert card.call(acl.read, at, 3) == content
        card.call(acl.unmap, at)
        card.call(acl.free_physical, chunk)
        instance.call(npu_actions.unshare, "it")
    assert answers(log) == {(LOGICAL, "same"), (CHUNK, "same")}, "the product asks for no whitelist"
    assert cann_host.violations() == []


def test_what_the_three_functions_refuse_the_double_refuses_too(start: Callable[..., CardProcess], log: Path) -> None:
    process = start()
    process.call(acl.set_device, 0)
    for attribute in range(4):
        with pytest.raises(AclError):
            process.call(acl.malloc_physical, acl.CHUNK, 0, attribute)
    shareable = process.call(acl.export_chunk, process.call(acl.malloc_physical, acl.CHUNK, 0))
    with pytest.raises(AclError):
        process.call(acl.allow_chunk, shareable, 4711)
    assert answers(log) == {(CHUNK, "same"), (ADMIT, "same")}
