"""The contract of the CANN double: point to point transfers between processes, and how they go wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest

from doubles.cann.control import CannHost, Fault
from support import acl, card_actions, datasystem_actions
from support.acl import CHUNK, AclError
from support.card_process import CardProcess

COPY_DATA = 507052
STREAM_SYNC_TIMEOUT = 507046
HCCL_PARAMETER, HCCL_UNAVAILABLE, HCCL_TCP_CONNECT, HCCL_REMOTE = 1, 7, 11, 21
PORTS_CHOSEN = {"HCCL_NPU_SOCKET_PORT_RANGE": "auto", "HCCL_HOST_SOCKET_PORT_RANGE": "auto"}
SIZE = 3_000_001

StartProcess = Callable[..., CardProcess]


class End(NamedTuple):
    process: CardProcess
    communicator: int
    stream: int


def connect(
    start_process: StartProcess, *, cards: tuple[int, int] = (0, 1), environment: dict[str, str] | None = None
) -> tuple[End, End]:
    first, second = start_process(environment=environment), start_process(environment=environment)
    first.call(acl.set_device, cards[0])
    second.call(acl.set_device, cards[1])
    root = first.call(acl.root_info)
    waiting = first.begin(card_actions.meet, root, 0)
    there = second.call(card_actions.meet, root, 1)
    return End(first, *waiting(10)), End(second, *there)


def send(end: End, address: int, size: int, wait_ms: int = 30_000) -> Callable[[float], float]:
    return end.process.begin(card_actions.send, end.communicator, end.stream, 1, address, size, wait_ms)


def receive(end: End, address: int, size: int, wait_ms: int = 30_000) -> Callable[[float], float]:
    return end.process.begin(card_actions.receive, end.communicator, end.stream, 0, address, size, wait_ms)


def part(*ends: End) -> None:
    for end in ends:
        end.process.call(card_actions.part, end.communicator, end.stream)


def test_what_is_sent_is_received(cann_host: CannHost, start_process: StartProcess) -> None:
    one, other = connect(start_process)
    source, destination = one.process.call(acl.malloc, SIZE), other.process.call(acl.malloc, SIZE)
    expected = datasystem_actions.content(1, SIZE)
    one.process.call(acl.write, source, expected)
    sent, received = send(one, source, SIZE), receive(other, destination, SIZE)
    sent(10), received(10)
    assert other.process.call(acl.read, destination, SIZE) == expected
    assert cann_host.counters(other.process.pid)["bytes_received"] == SIZE
    part(one, other)
    assert one.process.live == other.process.live == {"allocations": 1}


def test_mapped_chunks_and_imported_memory_can_be_sent(start_process: StartProcess) -> None:
    one, other = connect(start_process)
    address, _ = one.process.call(card_actions.map_chunks, 2, 0)
    one.process.call(acl.write, address + CHUNK - 2, b"abcd")
    owner = start_process()
    owner.call(acl.set_device, 1)
    owned = owner.call(acl.malloc, CHUNK)
    imported = other.process.call(acl.import_key, owner.call(acl.export, owned, CHUNK))
    sent, received = send(one, address + CHUNK - 4, 8), receive(other, imported + 3, 8)
    sent(10), received(10)
    assert owner.call(acl.read, owned, 12) == b"\0\0\0\0\0abcd\0\0\0"


def test_two_ranks_on_one_card_are_refused(start_process: StartProcess) -> None:
    with pytest.raises(AclError) as caught:
        connect(start_process, cards=(2, 2), environment=PORTS_CHOSEN)
    assert caught.value.code == HCCL_PARAMETER


def test_a_second_process_on_a_card_finds_the_ports_of_the_first_in_use(start_process: StartProcess) -> None:
    one, _ = connect(start_process, cards=(0, 1))
    second = start_process()
    second.call(acl.set_device, 0)
    with pytest.raises(AclError, match="EJ0003") as caught:
        second.call(acl.root_info)
    assert caught.value.code == HCCL_TCP_CONNECT
    with pytest.raises(AclError, match="EI0019") as caught:
        second.call(acl.create_communicator, one.process.call(acl.root_info), 1)
    assert caught.value.code == HCCL_UNAVAILABLE


@pytest.mark.parametrize("ranges", ["auto", "17000-17003", "16666,16667-16668"])
def test_processes_whose_ports_are_chosen_share_cards(start_process: StartProcess, ranges: str) -> None:
    chosen = dict.fromkeys(PORTS_CHOSEN, ranges)
    for _ in range(2):
        connect(start_process, environment=chosen)


def test_a_port_is_free_again_after_its_process(start_process: StartProcess) -> None:
    for _ in range(2):
        for end in connect(start_process):
            end.process.kill()


def test_a_card_of_another_host_is_another_card(start_process: StartProcess) -> None:
    with CannHost() as other_host:
        one, other = start_process(), CardProcess(other_host)
        try:
            one.call(acl.set_device, 0)
            other.call(acl.set_device, 0)
            root = one.call(acl.root_info)
            waiting = one.begin(card_actions.meet, root, 0)
            other.call(card_actions.meet, root, 1)
            waiting(10)
        finally:
            other.close()


def test_a_stream_that_hangs_can_be_destroyed_while_another_thread_waits_for_it(
    cann_host: CannHost, start_process: StartProcess
) -> None:
    one, other = connect(start_process)
    destination = other.process.call(acl.malloc, SIZE)
    one.process.kill()
    assert other.process.call(card_actions.destroy_while_another_thread_waits, other.communicator, destination)
    assert "pending_tasks" not in other.process.live
    assert cann_host.violations() == []


def test_different_sizes_break_both_streams(start_process: StartProcess) -> None:
    one, other = connect(start_process)
    source, destination = one.process.call(acl.malloc, SIZE), other.process.call(acl.malloc, SIZE)
    sent, received = send(one, source, SIZE), receive(other, destination, SIZE - 1)
    for answer in (sent, received):
        with pytest.raises(AclError) as caught:
            answer(10)
        assert caught.value.code == COPY_DATA


def test_host_memory_cannot_be_sent(start_process: StartProcess) -> None:
    one, _ = connect(start_process)
    address = one.process.call(acl.malloc_host, 4096)
    with pytest.raises(AclError) as caught:
        send(one, address, 4096)(10)
    assert caught.value.code == HCCL_PARAMETER


def test_what_was_received_is_read_after_synchronising_only(start_process: StartProcess) -> None:
    one, other = connect(start_process)
    destination = other.process.call(acl.malloc, SIZE)
    with pytest.raises(AclError) as caught:
        receive(other, destination, SIZE, wait_ms=100)(10)
    assert caught.value.code == STREAM_SYNC_TIMEOUT
    with pytest.raises(AclError, match="nobody has synchronised it"):
        other.process.call(acl.read, destination, 1)
    with pytest.raises(AclError, match="in use by 1 tasks"):
        other.process.call(acl.free, destination)
    part(other, one)


@contextmanager
def starved(pid: int) -> Iterator[None]:
    """All threads of a process but its first run where nothing else wants to, on a processor that is busy."""
    cpu = min(os.sched_getaffinity(0))
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            os.sched_setaffinity(busy.pid, {cpu})
            for thread in map(int, os.listdir(f"/proc/{pid}/task")):
                if thread != pid:
                    os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
                    os.sched_setaffinity(thread, {cpu})
            yield
        finally:
            busy.kill()


def test_what_has_arrived_is_in_use_no_more_at_the_sender(cann_host: CannHost, start_process: StartProcess) -> None:
    """The card ends the sender's task, however late its host's threads run."""
    one, other = connect(start_process)
    destination = other.process.call(acl.malloc, SIZE)
    with starved(one.process.pid):
        for _ in range(20):
            source = one.process.call(acl.malloc, SIZE)
            with pytest.raises(AclError):  # without waiting for the end
                send(one, source, SIZE, wait_ms=0)(10)
            receive(other, destination, SIZE)(30)
            one.process.call(acl.free, source)
    assert cann_host.violations() == []


def test_a_lost_peer_hangs_the_stream(start_process: StartProcess) -> None:
    one, other = connect(start_process)
    destination = other.process.call(acl.malloc, SIZE)
    receiving = receive(other, destination, SIZE, wait_ms=1000)
    one.process.kill()
    with pytest.raises(AclError) as caught:
        receiving(10)
    assert caught.value.code == STREAM_SYNC_TIMEOUT
    assert other.process.call(card_actions.communicator_error, other.communicator) == 0
    part(other)  # and it can be torn down
    other.process.call(acl.free, destination)


def test_a_lost_peer_is_an_error_on_demand(cann_host: CannHost, start_process: StartProcess) -> None:
    cann_host.inject(Fault.PEER_LOSS_ERROR)
    one, other = connect(start_process)
    source = one.process.call(acl.malloc, SIZE)
    sending = send(one, source, SIZE)
    other.process.kill()
    with pytest.raises(AclError) as caught:
        sending(10)
    assert caught.value.code == COPY_DATA
    assert one.process.call(card_actions.communicator_error, one.communicator) == HCCL_REMOTE


def test_a_living_peer_can_count_as_lost(cann_host: CannHost, start_process: StartProcess) -> None:
    cann_host.inject(Fault.PEER_LOSS_ERROR)
    one, _ = connect(start_process)
    sending = send(one, one.process.call(acl.malloc, SIZE), SIZE)
    cann_host.inject(Fault.PEER_LOST, pid=one.process.pid)
    with pytest.raises(AclError) as caught:
        sending(10)
    assert caught.value.code == COPY_DATA


def test_a_link_is_as_slow_as_asked(cann_host: CannHost, start_process: StartProcess) -> None:
    one, other = connect(start_process)
    cann_host.inject(Fault.SLOW_LINK, pid=other.process.pid, value=6e6)
    source, destination = one.process.call(acl.malloc, SIZE), other.process.call(acl.malloc, SIZE)
    sent, received = send(one, source, SIZE), receive(other, destination, SIZE)
    sent(10)
    assert 0.4 < received(10) < 2


def test_a_link_can_corrupt_what_it_carries(cann_host: CannHost, start_process: StartProcess) -> None:
    one, other = connect(start_process)
    cann_host.inject(Fault.CORRUPT_LINK, times=1)
    source, destination = one.process.call(acl.malloc, SIZE), other.process.call(acl.malloc, SIZE)
    wrong_bytes = []
    for _ in range(2):
        sent, received = send(one, source, SIZE), receive(other, destination, SIZE)
        sent(10), received(10)
        wrong_bytes.append(SIZE - other.process.call(acl.read, destination, SIZE).count(0))
    assert wrong_bytes == [1, 0]


def test_faults_can_be_there_from_the_start_of_a_process(start_process: StartProcess) -> None:
    process = start_process(faults={Fault.SLOW_COMMUNICATOR: 0.5, Fault.PEER_LOSS_ERROR: 0})
    peer = start_process()
    process.call(acl.set_device, 0)
    peer.call(acl.set_device, 1)
    root = process.call(acl.root_info)
    begun = time.monotonic()
    waiting = process.begin(card_actions.meet, root, 0)
    peer.call(card_actions.meet, root, 1)
    waiting(60)
    assert time.monotonic() - begun >= 0.5
