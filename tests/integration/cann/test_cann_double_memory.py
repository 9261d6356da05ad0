"""The contract of the CANN double: device memory, addresses, streams, and what it calls a violation."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from doubles.cann.control import CannHost, Fault
from support import acl, card_actions
from support.acl import AclError
from support.card_process import CardProcess, RemoteFailure

PARAM_INVALID = 107000
CONTEXT_NULL = 107002
INVALID_HANDLE = 107017
OUT_OF_MEMORY = 207001
AICPU_EXCEPTION = 507018
STREAM_SYNC_TIMEOUT = 507046
CARD_SETUP = 507033
DRIVER_ERROR = 507899

StartProcess = Callable[..., CardProcess]


def on_card(start_process: StartProcess, device: int = 0, **options: object) -> CardProcess:
    process = start_process(**options)
    process.call(acl.set_device, device)
    return process


def test_bytes_written_to_a_card_are_read_back(start_process: StartProcess) -> None:
    process = on_card(start_process)
    address = process.call(acl.malloc, 100_000)
    process.call(acl.write, address + 7, b"abc")
    assert process.call(acl.read, address + 6, 5) == b"\0abc\0"
    process.call(acl.free, address)
    assert process.live == {}


def test_a_host_that_reads_through_a_device_pointer_dies(start_process: StartProcess) -> None:
    process = on_card(start_process)
    address = process.call(acl.malloc, 4096)
    with pytest.raises(RemoteFailure, match=f"died: -{signal.SIGSEGV}"):
        process.call(card_actions.read_through_pointer, address)


def test_a_kernel_sees_device_memory(start_process: StartProcess) -> None:
    process = on_card(start_process)
    address = process.call(acl.malloc, 4096)
    process.call(acl.write, address, b"abc")
    assert process.call(card_actions.kernel_view, address, 3) == b"abc"
    process.call(acl.free, address)
    assert process.call(card_actions.kernel_view, address, 3) is None


def test_use_after_free_is_a_violation_for_ever(cann_host: CannHost, start_process: StartProcess) -> None:
    process = on_card(start_process)
    address = process.call(acl.malloc, 8192)
    process.call(acl.free, address)
    assert process.call(acl.malloc, 8192) != address
    with pytest.raises(AclError, match="not device memory"):
        process.call(acl.read, address + 4096, 1)
    with pytest.raises(AclError, match="not the start of a live allocation"):
        process.call(acl.free, address)
    assert len(cann_host.violations(process.pid)) == 2


def test_reading_behind_an_allocation_is_a_violation(cann_host: CannHost, start_process: StartProcess) -> None:
    process = on_card(start_process)
    address = process.call(acl.malloc, 4096)
    with pytest.raises(AclError, match="1 bytes behind the allocation"):
        process.call(acl.read, address, 4097)
    assert len(cann_host.violations()) == 1


def test_memory_of_another_card_is_a_violation(start_process: StartProcess) -> None:
    process = on_card(start_process, 0)
    address = process.call(acl.malloc, 4096)
    process.call(acl.set_device, 1)
    with pytest.raises(AclError, match="is on card 3, the work is on card 5"):
        process.call(acl.read, address, 1)


def test_the_device_is_set_for_each_thread(start_process: StartProcess) -> None:
    assert start_process().call(card_actions.set_device_in_another_thread, 0) == CONTEXT_NULL


def test_a_fork_of_a_process_that_uses_a_card_cannot(start_process: StartProcess) -> None:
    assert on_card(start_process).call(card_actions.call_in_fork) == 0


def test_cards_are_counted_in_three_ways(cann_host: CannHost, start_process: StartProcess) -> None:
    process = start_process(visible="2,5")
    devices = (0, 1)
    assert [process.call(acl.logical_card, device) for device in devices] == [2, 5]
    assert [process.call(acl.physical_card, device) for device in devices] == [5, 11]
    with pytest.raises(AclError, match="there is no device 2"):
        process.call(acl.set_device, 2)


@pytest.mark.parametrize("visible", ["5,2", "2,2"])
def test_a_list_that_does_not_ascend_shows_no_device(start_process: StartProcess, visible: str) -> None:
    process = start_process(visible=visible)
    assert process.call(acl.device_count) == 0
    with pytest.raises(AclError, match="there is no device 0"):
        process.call(acl.set_device, 0)


def test_a_runtime_that_was_not_initialised_works_and_does_not_say_why_it_fails(start_process: StartProcess) -> None:
    process = start_process()
    assert process.call(card_actions.fail_without_aclinit) == ""
    assert "aclrtSetDevice before aclInit: nothing would say why a call fails" in process.host.violations()
    (process.host.directory / "processes" / f"{process.pid}.violations").unlink()


def test_the_runtime_is_initialised_once(start_process: StartProcess) -> None:
    with pytest.raises(AclError) as caught:
        start_process().call(acl.call, "aclInit", None)
    assert caught.value.code == acl.ALREADY_INITIALISED


def test_a_card_has_so_much_memory_for_all_processes(cann_host: CannHost, start_process: StartProcess) -> None:
    first, second = on_card(start_process), on_card(start_process)
    first.call(acl.malloc, 3 << 30)
    assert cann_host.used_bytes() == {0: 3 << 30}
    with pytest.raises(AclError, match="out of memory") as caught:
        second.call(acl.malloc, 2 << 30)
    assert caught.value.code == OUT_OF_MEMORY
    first.kill()
    assert cann_host.used_bytes() == {}
    second.call(acl.malloc, 2 << 30)


def test_out_of_memory_on_demand_strikes_as_often_as_asked(cann_host: CannHost, start_process: StartProcess) -> None:
    hit, spared = on_card(start_process), on_card(start_process)
    cann_host.inject(Fault.OUT_OF_MEMORY, pid=hit.pid, times=1)
    spared.call(acl.malloc, 4096)
    with pytest.raises(AclError, match="out of memory"):
        hit.call(acl.malloc, 4096)
    hit.call(acl.malloc, 4096)


def test_what_a_killed_process_had_can_still_be_read(start_process: StartProcess) -> None:
    process = on_card(start_process)
    process.call(acl.malloc, 4096)
    process.call(acl.create_stream)
    process.kill()
    assert process.live == {"allocations": 1, "streams": 1}


def test_violations_are_only_counted_where_strictness_is_off(cann_host: CannHost, start_process: StartProcess) -> None:
    process = on_card(start_process, strict=False)
    address = process.call(acl.malloc, 4096)
    process.call(acl.write, address, b"abc")
    process.call(acl.set_device, 1)
    assert process.call(acl.read, address, 3) == b"abc"
    assert len(cann_host.violations(process.pid)) == cann_host.counters(process.pid)["violations"] == 1


def test_a_batch_of_copies_is_made_in_both_directions(start_process: StartProcess) -> None:
    process = on_card(start_process)
    source, destination = process.call(acl.malloc, 8192), process.call(acl.malloc, 8192)
    process.call(acl.write, source, b"a" * 4096 + b"b" * 4096)
    process.call(card_actions.copy_batch, [(destination, source + 4096, 4096), (destination + 4096, source, 4096)])
    assert process.call(acl.read, destination, 8192) == b"b" * 4096 + b"a" * 4096


# ---- streams
def test_a_read_before_the_stream_was_synchronised_is_a_violation(
    cann_host: CannHost, start_process: StartProcess
) -> None:
    process = on_card(start_process)
    source, destination = process.call(acl.malloc, 4096), process.call(acl.malloc, 4096)
    process.call(acl.write, source, b"abc")
    stream = process.call(acl.create_stream)
    process.call(card_actions.copy_async, destination, source, 4096, stream)
    with pytest.raises(AclError, match="nobody has synchronised it"):
        process.call(acl.read, destination, 3)
    process.call(acl.synchronize, stream)
    assert process.call(acl.read, destination, 3) == b"abc"
    assert len(cann_host.violations()) == 1


def test_waiting_for_an_event_synchronises_what_was_before_it(start_process: StartProcess) -> None:
    process = on_card(start_process)
    source, middle, destination = (process.call(acl.malloc, 4096) for _ in range(3))
    process.call(acl.write, source, b"abc")
    first, second = process.call(acl.create_stream), process.call(acl.create_stream)
    process.call(card_actions.copy_async, middle, source, 4096, first)
    process.call(card_actions.make_wait, second, first)
    process.call(card_actions.copy_async, destination, middle, 4096, second)
    process.call(card_actions.wait_for_event_of, second)
    assert process.call(acl.read, middle, 3) == process.call(acl.read, destination, 3) == b"abc"


@pytest.mark.parametrize("block", [False, True])
def test_a_callback_runs_in_its_thread_after_what_was_before_it(start_process: StartProcess, block: bool) -> None:
    assert on_card(start_process).call(card_actions.run_callback, block)


def test_memory_that_a_stream_still_uses_cannot_be_freed_or_overwritten(start_process: StartProcess) -> None:
    process = on_card(start_process)
    source, destination = process.call(acl.malloc, 4096), process.call(acl.malloc, 4096)
    stream, notify = process.call(card_actions.blocked_stream)
    process.call(card_actions.copy_async, destination, source, 4096, stream)
    with pytest.raises(AclError, match="in use by 1 tasks"):
        process.call(acl.free, source)
    with pytest.raises(AclError, match="still reads"):
        process.call(acl.write, source, b"abc")
    with pytest.raises(AclError) as caught:
        process.call(acl.synchronize, stream, 100)
    assert caught.value.code == STREAM_SYNC_TIMEOUT
    process.call(card_actions.unblock, notify)
    process.call(acl.synchronize, stream)
    process.call(acl.free, source)


def test_a_destroyed_stream_is_known_to_be_destroyed(start_process: StartProcess) -> None:
    process = on_card(start_process)
    stream = process.call(acl.create_stream)
    process.call(acl.call, "aclrtDestroyStream", stream)
    process.call(acl.create_stream)
    with pytest.raises(AclError, match="not a live stream handle"):
        process.call(acl.synchronize, stream)


def test_an_asynchronous_error_breaks_the_stream(cann_host: CannHost, start_process: StartProcess) -> None:
    process = on_card(start_process)
    address, stream = process.call(acl.malloc, 4096), process.call(acl.create_stream)
    cann_host.inject(Fault.ASYNC_ERROR, times=1)
    process.call(card_actions.copy_async, address, address + 2048, 2048, stream)
    for _ in range(2):
        with pytest.raises(AclError) as caught:
            process.call(acl.synchronize, stream)
        assert caught.value.code == AICPU_EXCEPTION
    process.call(acl.synchronize, process.call(acl.create_stream))


def test_a_reset_card_is_lost_for_the_processes_that_used_it(cann_host: CannHost, start_process: StartProcess) -> None:
    process = on_card(start_process)
    address = process.call(acl.malloc, 4096)
    cann_host.inject(Fault.DEVICE_RESET, card=0)
    with pytest.raises(AclError, match="was reset") as caught:
        process.call(acl.read, address, 1)
    assert caught.value.code == DRIVER_ERROR
    cann_host.clear()
    with pytest.raises(AclError, match="was reset"):
        process.call(acl.read, address, 1)
    on_card(start_process).call(acl.malloc, 4096)


def test_a_card_that_does_not_start_says_so(cann_host: CannHost, start_process: StartProcess) -> None:
    cann_host.inject(Fault.CARD_UNAVAILABLE, card=3)
    with pytest.raises(AclError, match="card 9 does not start") as caught:
        on_card(start_process, 3)
    assert caught.value.code == CARD_SETUP
    on_card(start_process, 4)
