"""The contract of the CANN double: memory shared between processes, by export keys and by shareable handles."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from doubles.cann.control import CannHost, Fault
from support import acl, card_actions
from support.acl import CHUNK, AclError
from support.card_process import CardProcess

NO_PERMISSION = 207006
INVALID_PARAM = 100000
CONTEXT_NULL = 107002
DRIVER_ERROR = 507899
SIZE = 4 << 20

StartProcess = Callable[..., CardProcess]


@pytest.fixture
def exporter(start_process: StartProcess) -> CardProcess:
    """A process on card 0."""
    process = start_process()
    process.call(acl.set_device, 0)
    return process


@pytest.fixture
def importer(start_process: StartProcess) -> CardProcess:
    """Another one."""
    process = start_process()
    process.call(acl.set_device, 0)
    return process


# ---- plain allocations
def test_an_imported_allocation_is_the_same_memory(
    cann_host: CannHost, exporter: CardProcess, importer: CardProcess
) -> None:
    address = exporter.call(acl.malloc, SIZE)
    key = exporter.call(acl.export, address, SIZE)
    assert len(key) == 36
    imported = importer.call(acl.import_key, key)
    exporter.call(acl.write, address + 5, b"abc")
    assert importer.call(acl.read, imported + 5, 3) == b"abc"
    importer.call(acl.write, imported, b"xyz")
    assert exporter.call(acl.read, address, 3) == b"xyz"
    assert importer.live == {"imports": 1}
    assert cann_host.used_bytes() == {0: SIZE}

    importer.call(acl.close_key, key)
    exporter.call(acl.close_key, key)
    exporter.call(acl.free, address)
    assert importer.live == exporter.live == {}
    assert cann_host.used_bytes() == {}
    assert cann_host.violations() == []


@pytest.mark.parametrize(("offset", "length"), [(512, 4096), (4096, 4096), (0, SIZE + 1), (2 << 20, SIZE)])
def test_a_part_that_begins_within_a_page_or_ends_behind_the_allocation_has_no_key(
    exporter: CardProcess, offset: int, length: int
) -> None:
    address = exporter.call(acl.malloc, SIZE)
    with pytest.raises(AclError, match="not a part, from a page"):
        exporter.call(acl.export, address + offset, length)


def test_an_allocation_has_any_number_of_keys_for_any_part_that_begins_with_a_page(
    exporter: CardProcess, importer: CardProcess
) -> None:
    address = exporter.call(acl.malloc, SIZE)
    exporter.call(acl.write, address + (2 << 20), b"abc")
    keys = [exporter.call(acl.export, address, SIZE) for _ in range(2)]
    keys.append(exporter.call(acl.export, address + (2 << 20), 100))
    assert len(set(keys)) == 3
    imported = [importer.call(acl.import_key, key) for key in keys]
    assert len(set(imported)) == 3
    assert importer.call(acl.read, imported[1] + (2 << 20), 3) == importer.call(acl.read, imported[2], 3) == b"abc"
    exporter.call(acl.close_key, keys[0])
    assert importer.call(acl.read, imported[2], 3) == b"abc"


def test_a_key_says_the_exporters_bare_tgid_and_the_physical_card(exporter: CardProcess) -> None:
    exporter.call(acl.set_device, 3)
    key = exporter.call(acl.export, exporter.call(acl.malloc, SIZE), SIZE)
    assert (int(key[:8], 16), int(key[24:26], 16)) == (exporter.call(acl.bare_tgid), CannHost.physical(3))


def test_the_exporting_process_cannot_import(exporter: CardProcess) -> None:
    key = exporter.call(acl.export, exporter.call(acl.malloc, SIZE), SIZE)
    with pytest.raises(AclError, match="may not export and import"):
        exporter.call(acl.import_key, key)


def test_a_second_import_in_a_process_is_the_same_memory_and_the_first_close_forgets_the_key(
    exporter: CardProcess, importer: CardProcess
) -> None:
    key = exporter.call(acl.export, exporter.call(acl.malloc, SIZE), SIZE)
    imported = importer.call(acl.import_key, key)
    assert importer.call(acl.import_key, key) == imported
    importer.call(acl.close_key, key)
    assert importer.call(acl.read, imported, 1) == b"\0"
    with pytest.raises(AclError, match="No permission to destroy"):
        importer.call(acl.close_key, key)


def test_a_key_is_closed_and_admits_processes_in_a_thread_with_a_device(exporter: CardProcess) -> None:
    key = exporter.call(acl.export, exporter.call(acl.malloc, SIZE), SIZE, any_process=False)
    assert exporter.call(card_actions.call_without_device, 0, "aclrtIpcMemClose", key) == CONTEXT_NULL
    assert exporter.call(card_actions.call_without_device, 0, "aclrtIpcMemSetImportPid", key, None, 0) == CONTEXT_NULL


def test_memory_is_imported_on_its_own_card_only(exporter: CardProcess, importer: CardProcess) -> None:
    key = exporter.call(acl.export, exporter.call(acl.malloc, SIZE), SIZE)
    importer.call(acl.set_device, 1)
    with pytest.raises(AclError, match="memory of card 3") as caught:
        importer.call(acl.import_key, key)
    assert caught.value.code == DRIVER_ERROR


def test_only_a_whitelisted_bare_tgid_may_import(exporter: CardProcess, importer: CardProcess) -> None:
    key = exporter.call(acl.export, exporter.call(acl.malloc, SIZE), SIZE, any_process=False)
    exporter.call(acl.allow, key, importer.pid)  # the number that the process sees itself is not the bare one
    with pytest.raises(AclError, match="whitelist") as caught:
        importer.call(acl.import_key, key)
    assert caught.value.code == NO_PERMISSION
    exporter.call(acl.allow, key, importer.call(acl.bare_tgid))
    importer.call(acl.import_key, key)


def test_a_key_without_a_whitelist_takes_none(exporter: CardProcess, importer: CardProcess) -> None:
    key = exporter.call(acl.export, exporter.call(acl.malloc, SIZE), SIZE)
    with pytest.raises(AclError, match="no need wlist"):
        exporter.call(acl.allow, key, importer.call(acl.bare_tgid))
    shareable = exporter.call(acl.export_chunk, exporter.call(acl.malloc_physical, CHUNK, 0))
    with pytest.raises(AclError, match="no need wlist"):
        exporter.call(acl.allow_chunk, shareable, importer.call(acl.bare_tgid))


def test_memory_that_a_stream_writes_cannot_be_exported(exporter: CardProcess) -> None:
    source, address = exporter.call(acl.malloc, SIZE), exporter.call(acl.malloc, SIZE)
    stream = exporter.call(acl.create_stream)
    exporter.call(card_actions.copy_async, address + 4096, source, 4096, stream)
    with pytest.raises(AclError, match="nobody has synchronised it"):
        exporter.call(acl.export, address, SIZE)
    exporter.call(acl.synchronize, stream)
    exporter.call(acl.export, address, SIZE)


def test_memory_with_keys_or_importers_is_not_freed(
    cann_host: CannHost, exporter: CardProcess, importer: CardProcess
) -> None:
    address = exporter.call(acl.malloc, SIZE)
    key = exporter.call(acl.export, address, SIZE)
    importer.call(acl.import_key, key)
    with pytest.raises(AclError, match="still imported by 1 processes"):
        exporter.call(acl.free, address)
    importer.call(acl.close_key, key)
    with pytest.raises(AclError, match="export key that was not closed"):
        exporter.call(acl.free, address)
    assert len(cann_host.violations(exporter.pid)) == 2
    exporter.call(acl.close_key, key)
    exporter.call(acl.free, address)


def test_the_exporters_close_takes_the_memory_from_an_importer_whose_context_breaks_when_it_uses_it(
    cann_host: CannHost, exporter: CardProcess, importer: CardProcess
) -> None:
    key = exporter.call(acl.export, exporter.call(acl.malloc, SIZE), SIZE)
    imported = importer.call(acl.import_key, key)
    own = importer.call(acl.malloc, SIZE)
    exporter.call(acl.close_key, key)
    importer.call(acl.write, own, b"abc")
    with pytest.raises(AclError, match="page fault") as caught:
        importer.call(acl.read, imported, 1)
    assert caught.value.code == DRIVER_ERROR
    assert "ended the export" in cann_host.violations(importer.pid)[0]
    with pytest.raises(AclError, match="can do nothing more with the card"):
        importer.call(acl.read, own, 1)
    importer.call(acl.set_device, 1)
    importer.call(acl.malloc, SIZE)


def test_what_is_not_used_any_more_can_be_closed_after_its_exporter(
    exporter: CardProcess, importer: CardProcess
) -> None:
    key = exporter.call(acl.export, exporter.call(acl.malloc, SIZE), SIZE)
    importer.call(acl.import_key, key)
    exporter.kill()
    importer.call(acl.close_key, key)
    assert importer.live == {}


def test_a_dead_importer_holds_nothing(exporter: CardProcess, importer: CardProcess) -> None:
    address = exporter.call(acl.malloc, SIZE)
    key = exporter.call(acl.export, address, SIZE)
    importer.call(acl.import_key, key)
    importer.kill()
    exporter.call(acl.close_key, key)
    exporter.call(acl.free, address)


def test_the_death_of_an_exporter_takes_its_memory_from_every_importer(
    cann_host: CannHost, start_process: StartProcess, exporter: CardProcess, importer: CardProcess
) -> None:
    key = exporter.call(acl.export, exporter.call(acl.malloc, SIZE), SIZE)
    imported = importer.call(acl.import_key, key)
    exporter.kill()
    assert cann_host.used_bytes() == {}
    late = start_process()
    late.call(acl.set_device, 0)
    with pytest.raises(AclError, match="no memory has this key"):
        late.call(acl.import_key, key)
    with pytest.raises(AclError, match="page fault"):
        importer.call(acl.read, imported, 3)
    assert cann_host.violations() == [], "no process is to blame for the death of another one"


def test_an_import_can_be_refused_on_demand(cann_host: CannHost, exporter: CardProcess, importer: CardProcess) -> None:
    key = exporter.call(acl.export, exporter.call(acl.malloc, SIZE), SIZE)
    cann_host.inject(Fault.IMPORT_REFUSED, pid=importer.pid, times=1)
    with pytest.raises(AclError, match="refuses this import") as caught:
        importer.call(acl.import_key, key)
    assert caught.value.code == DRIVER_ERROR
    importer.call(acl.import_key, key)


# ---- virtual memory management
@pytest.mark.parametrize("attribute", [0, 1, 2, 8, 99])
def test_a_chunk_is_made_of_the_cards_memory(exporter: CardProcess, attribute: int) -> None:
    with pytest.raises(AclError) as caught:
        exporter.call(acl.malloc_physical, CHUNK, 0, attribute)
    assert caught.value.code == INVALID_PARAM


def test_chunks_at_consecutive_addresses_are_one_memory(exporter: CardProcess) -> None:
    address, handles = exporter.call(card_actions.map_chunks, 3, 0)
    exporter.call(acl.write, address + CHUNK - 2, b"abcd")
    assert exporter.call(acl.read, address + CHUNK, 2) == b"cd"
    exporter.call(card_actions.unmap_chunks, address, handles)
    assert exporter.live == {}


def test_reserved_addresses_without_memory_cannot_be_read(exporter: CardProcess) -> None:
    address = exporter.call(acl.reserve, 2 * CHUNK)
    exporter.call(acl.map_chunk, address, CHUNK, exporter.call(acl.malloc_physical, CHUNK, 0))
    with pytest.raises(AclError, match="no memory is mapped there"):
        exporter.call(acl.read, address + CHUNK - 1, 2)
    with pytest.raises(AclError, match="memory is still mapped"):
        exporter.call(acl.release, address)


def test_imported_chunks_are_the_same_memory(cann_host: CannHost, exporter: CardProcess, importer: CardProcess) -> None:
    address, handles = exporter.call(card_actions.map_chunks, 2, 0)
    shareables = [exporter.call(acl.export_chunk, handle) for handle in handles]
    imported, imported_handles = importer.call(card_actions.map_shared, shareables, 0)
    exporter.call(acl.write, address + CHUNK - 2, b"abcd")
    assert importer.call(acl.read, imported + CHUNK - 2, 4) == b"abcd"
    importer.call(card_actions.unmap_chunks, imported, imported_handles)
    exporter.call(card_actions.unmap_chunks, address, handles)
    assert importer.live == exporter.live == {}
    assert cann_host.used_bytes() == {}


def test_a_chunk_is_freed_when_every_importer_has_released_it(
    cann_host: CannHost, exporter: CardProcess, importer: CardProcess
) -> None:
    address, handles = exporter.call(card_actions.map_chunks, 1, 0)
    exporter.call(acl.write, address, b"abc")
    shareable = exporter.call(acl.export_chunk, handles[0])
    imported, imported_handles = importer.call(card_actions.map_shared, [shareable], 0)
    exporter.call(card_actions.unmap_chunks, address, handles)
    assert exporter.live == {}
    assert importer.call(acl.read, imported, 3) == b"abc"
    assert cann_host.used_bytes() == {0: CHUNK}
    importer.call(card_actions.unmap_chunks, imported, imported_handles)
    assert cann_host.used_bytes() == {}
    with pytest.raises(AclError, match="Share handle doesn't exist"):
        importer.call(acl.import_chunk, shareable, 0)


def test_memory_lives_while_it_is_mapped_or_a_handle_is_kept(cann_host: CannHost, exporter: CardProcess) -> None:
    address, handles = exporter.call(card_actions.map_chunks, 1, 0)
    again = exporter.call(acl.retain, address)
    assert again == handles[0]
    exporter.call(acl.free_physical, handles[0])
    exporter.call(acl.free_physical, again)
    assert cann_host.used_bytes() == {0: CHUNK}
    exporter.call(acl.unmap, address)
    assert cann_host.used_bytes() == {}
    with pytest.raises(AclError, match="not a live physical memory handle"):
        exporter.call(acl.free_physical, again)


def test_the_handle_of_an_address_is_found_at_its_start_only(exporter: CardProcess) -> None:
    address, _ = exporter.call(card_actions.map_chunks, 1, 0)
    with pytest.raises(AclError, match="no mapped memory begins at"):
        exporter.call(acl.retain, address + 4096)
    with pytest.raises(AclError, match="no mapped memory begins at"):
        exporter.call(acl.retain, exporter.call(acl.malloc, SIZE))


def test_a_chunk_has_one_shareable_handle(exporter: CardProcess) -> None:
    handle = exporter.call(acl.malloc_physical, CHUNK, 0)
    exporter.call(acl.export_chunk, handle)
    with pytest.raises(AclError, match="has a shareable handle already"):
        exporter.call(acl.export_chunk, handle)


def test_import_and_export_in_one_process_are_refused(exporter: CardProcess, importer: CardProcess) -> None:
    shareable = exporter.call(acl.export_chunk, exporter.call(acl.malloc_physical, CHUNK, 0))
    with pytest.raises(AclError, match="may not export and import"):
        exporter.call(acl.import_chunk, shareable, 0)
    handle = importer.call(acl.import_chunk, shareable, 0)
    with pytest.raises(AclError, match="imported cannot be exported"):
        importer.call(acl.export_chunk, handle)


def test_a_second_import_of_a_chunk_in_a_process_is_the_same_handle(
    exporter: CardProcess, importer: CardProcess
) -> None:
    shareable = exporter.call(acl.export_chunk, exporter.call(acl.malloc_physical, CHUNK, 0))
    handle = importer.call(acl.import_chunk, shareable, 0)
    assert importer.call(acl.import_chunk, shareable, 0) == handle
    importer.call(acl.free_physical, handle)
    importer.call(acl.free_physical, handle)
    assert importer.live == {}


def test_a_chunk_is_imported_for_as_long_as_any_process_holds_it(
    cann_host: CannHost, start_process: StartProcess, exporter: CardProcess, importer: CardProcess
) -> None:
    address, handles = exporter.call(card_actions.map_chunks, 1, 0)
    exporter.call(acl.write, address, b"abc")
    shareable = exporter.call(acl.export_chunk, handles[0])
    handle = importer.call(acl.import_chunk, shareable, 0)
    exporter.kill()
    late = start_process()
    late.call(acl.set_device, 0)
    imported, _ = late.call(card_actions.map_shared, [shareable], 0)
    importer.call(acl.free_physical, handle)
    assert late.call(acl.read, imported, 3) == b"abc"
    late.kill()
    assert cann_host.used_bytes() == {}
    with pytest.raises(AclError, match="Share handle doesn't exist"):
        importer.call(acl.import_chunk, shareable, 0)


def test_a_shareable_handle_counts_cards_as_the_container_of_its_exporter(
    cann_host: CannHost, start_process: StartProcess, exporter: CardProcess, importer: CardProcess
) -> None:
    """A process of another container takes it for another card's."""
    shareables = [exporter.call(acl.export_chunk, exporter.call(acl.malloc_physical, CHUNK, 0)) for _ in range(2)]
    assert shareables == [CannHost.logical(0) << 32, CannHost.logical(0) << 32 | 1], "they can be guessed"
    elsewhere = start_process(container=[CannHost.physical(0)], visible="")
    elsewhere.call(acl.set_device, 0)
    with pytest.raises(AclError, match="Share handle doesn't exist"):
        elsewhere.call(acl.import_chunk, shareables[0], 0)
    foreign = elsewhere.call(acl.export_chunk, elsewhere.call(acl.malloc_physical, CHUNK, 0))
    assert foreign == 2, "on card 0 of its container"
    with pytest.raises(AclError, match="Share handle doesn't exist"):
        importer.call(acl.import_chunk, foreign, 0)


def test_a_chunk_needs_a_whitelisted_bare_tgid_on_its_card(exporter: CardProcess, importer: CardProcess) -> None:
    handle = exporter.call(acl.malloc_physical, CHUNK, 0)
    shareable = exporter.call(acl.export_chunk, handle, any_process=False)
    with pytest.raises(AclError, match="whitelist"):
        importer.call(acl.import_chunk, shareable, 0)
    exporter.call(acl.allow_chunk, shareable, importer.call(acl.bare_tgid))
    with pytest.raises(AclError, match="memory of card 3"):
        importer.call(acl.import_chunk, shareable, 1)
    importer.call(acl.import_chunk, shareable, 0)


def test_a_key_of_chunks_is_given_but_cannot_be_imported(exporter: CardProcess, importer: CardProcess) -> None:
    address, _ = exporter.call(card_actions.map_chunks, 1, 0)
    key = exporter.call(acl.export, address, CHUNK)
    with pytest.raises(AclError, match="shared by shareable handles") as caught:
        importer.call(acl.import_key, key)
    assert caught.value.code == DRIVER_ERROR
