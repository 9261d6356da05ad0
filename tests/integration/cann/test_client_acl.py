"""The client's ACL, on the driver double: every call that the device path makes, and what failures say."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest

from doubles.cann.control import CannHost, Fault
from support import acl, client_acl_actions
from support.card_process import CardProcess, RemoteFailure
from support.client_acl_actions import call, read, write
from weight_broker.drivers.acl import Acl, AclError, AclUnavailable, visible_device

SIZE = 4 << 20
CHUNK = 2 << 20
StartProcess = Callable[..., CardProcess]


@pytest.fixture
def process(start_process: StartProcess) -> CardProcess:
    """A process on card 0."""
    started = start_process()
    started.call(call, "set_device", 0)
    return started


@pytest.fixture
def other(start_process: StartProcess) -> CardProcess:
    """Another one."""
    started = start_process()
    started.call(call, "set_device", 0)
    return started


def test_an_allocation_is_shared_used_and_given_back(
    cann_host: CannHost, process: CardProcess, other: CardProcess
) -> None:
    address = process.call(call, "malloc", SIZE)
    key = process.call(call, "ipc_export_key", address, SIZE)
    process.call(call, "ipc_set_import_pids", key, [other.call(call, "bare_tgid")])
    imported = other.call(call, "ipc_import", key)
    process.call(write, address + 9, b"weights")
    process.call(call, "synchronize_device")
    assert other.call(read, imported + 9, 7) == b"weights"
    other.call(call, "ipc_close", key)
    process.call(call, "ipc_close", key)
    process.call(call, "free", address)
    assert process.live == other.live == {}
    assert cann_host.violations() == []


def test_chunks_are_shared_used_and_given_back(cann_host: CannHost, process: CardProcess, other: CardProcess) -> None:
    mine = process.call(call, "reserve_address", CHUNK)
    chunk = process.call(acl.malloc_physical, CHUNK, 0)
    process.call(call, "map", mine, CHUNK, chunk)
    retained = process.call(call, "retain_allocation_handle", mine)
    shareable = process.call(call, "export_shareable_handle", retained)
    process.call(call, "set_pids_to_shareable_handle", shareable, [other.call(call, "bare_tgid")])
    theirs = other.call(call, "import_shareable_handle", shareable, 0)
    address = other.call(call, "reserve_address", CHUNK)
    other.call(call, "map", address, CHUNK, theirs)
    process.call(write, mine + CHUNK - 7, b"weights")
    assert other.call(read, address + CHUNK - 7, 7) == b"weights"
    other.call(call, "unmap", address)
    other.call(call, "free_physical", theirs)
    other.call(call, "release_address", address)
    process.call(call, "free_physical", retained)
    process.call(call, "unmap", mine)
    process.call(call, "free_physical", chunk)
    process.call(call, "release_address", mine)
    assert process.live == other.live == {}
    assert cann_host.violations() == []


def test_devices_are_counted_as_the_process_sees_them_and_known_by_their_physical_number(
    start_process: StartProcess,
) -> None:
    process = start_process(visible="1,6")
    assert process.call(call, "device_count") == 2
    assert [process.call(call, "physical_device", device) for device in (0, 1)] == [3, 13]
    assert [process.call(client_acl_actions.physical_device_by_old_cann, device) for device in (0, 1)] == [1, 6]
    assert process.call(call, "soc_name") == "Ascend910B4"


@pytest.mark.parametrize(("visible", "device", "expected"), [(None, 3, 3), ("", 3, 3), ("4", 0, 4), ("7, 5", 1, 5)])
def test_visible_devices_are_counted_in_the_order_of_the_variable(
    visible: str | None, device: int, expected: int
) -> None:
    assert visible_device(device, visible) == expected


@pytest.mark.parametrize("visible", ["4", "4,", "4,x"])
def test_a_device_that_is_not_visible_has_no_number(visible: str) -> None:
    with pytest.raises(AclError, match="has no number for device 1"):
        visible_device(1, visible)


def test_the_thread_is_back_on_its_device_after_a_stay_on_another_one(
    process: CardProcess, start_process: StartProcess
) -> None:
    assert process.call(client_acl_actions.devices_around, 3) == [0, 3, 0]
    assert process.call(client_acl_actions.devices_around, 3, fail=True) == [0, 3, 0]
    fresh = start_process()
    fresh.call(call, "initialize")
    assert fresh.call(client_acl_actions.devices_around, 2) == [None, 2, 2]


def test_initialising_more_than_once_is_no_error(process: CardProcess) -> None:
    process.call(call, "initialize")
    process.call(call, "initialize")


def test_a_failure_says_which_call_failed_how_and_what_the_driver_says(
    cann_host: CannHost, process: CardProcess
) -> None:
    cann_host.inject(Fault.OUT_OF_MEMORY, pid=process.pid)
    with pytest.raises(RemoteFailure, match=r"AclError: aclrtMalloc failed with 207001: .*memory"):
        process.call(call, "malloc", SIZE)


def test_a_function_that_an_old_cann_lacks_is_named(process: CardProcess) -> None:
    with pytest.raises(RemoteFailure, match=r"AclUnavailable: aclrtIpcMemGetExportKey is not available: .*8\.3"):
        process.call(client_acl_actions.export_by_old_cann)


def test_a_machine_without_cann_is_told_so() -> None:
    with pytest.raises(AclUnavailable, match=r"libnosuch\.so is not available: .*set_env\.sh"):
        Acl("libnosuch.so")


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(AclError("aclrtFree", 107000, "why")))
    assert (error.call, error.code, error.words) == ("aclrtFree", 107000, "why")
