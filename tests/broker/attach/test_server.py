"""The attach socket, spoken to by real sockets and real processes, polite and hostile ones."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.attach_room import GOODBYE, HELLO, WITHDRAW, AttachRoom
from support.sealed_memory import memfd, open_descriptors
from support.waiting import eventually
from weight_broker.errors import BrokerUnavailable, NotAttached, Reason
from weight_broker.v1 import attach_pb2 as pb
from weight_brokerd.attach import peer, server, strangers
from weight_brokerd.core.model import Process
from weight_brokerd.processes.packets import MAXIMUM_PACKET_BYTES

OFFER = pb.AttachRequest(offer_region=pb.OfferRegion(region_id="region", size_bytes=7))
CLAIM = pb.AttachRequest(claim_region=pb.ClaimRegion(transfer_id="transfer-1", region_index=3))
SOCKETS_PIDFDS_AND_MEMORY = ("socket:", "anon_inode:[pidfd]", "pidfd:", "/memfd:")


@pytest.fixture
def room(tmp_path: Path) -> Iterator[AttachRoom]:
    """A server; whatever the test did, the server gives every descriptor back."""
    before = open_descriptors(SOCKETS_PIDFDS_AND_MEMORY)
    room = AttachRoom(tmp_path / "attach.sock")
    yield room
    room.close()
    assert open_descriptors(SOCKETS_PIDFDS_AND_MEMORY) == before, "a descriptor leaked"


@pytest.fixture
def start_child(room: AttachRoom) -> Iterator[Callable[[str], tuple[subprocess.Popen[str], str]]]:
    """Starts a process that attaches; also returns the first line that it prints."""
    with ExitStack() as stack:

        def start(behaviour: str) -> tuple[subprocess.Popen[str], str]:
            child = room.child(behaviour)
            assert child.stdout is not None
            stack.callback(child.stdout.close)
            stack.callback(child.wait)
            stack.callback(child.kill)
            return child, child.stdout.readline().strip()

        yield start


def refused(response: pb.AttachResponse) -> tuple[str, str]:
    assert response.HasField("refused"), response
    return response.refused.reason, response.refused.message


def test_hello_is_answered_with_the_token_and_the_ids(room: AttachRoom) -> None:
    with room.client() as client:
        welcome = client.ask(HELLO).welcome
    assert welcome == pb.Welcome(
        session_token=b"\1" * 32, instance_id="instance-1", host_id="host-1", broker_version="1.2.3"
    )
    assert room.attendance.events[0] == ("attach", "test", "1")


def test_the_kernel_says_who_connected(
    room: AttachRoom, start_child: Callable[[str], tuple[subprocess.Popen[str], str]]
) -> None:
    child, _ = start_child("stay")
    with room.instance():
        attested = room.attendance.peers
    assert [one.pid for one in attested] == [child.pid, os.getpid()]
    for one in attested:
        assert (one.uid, one.gid) == (os.getuid(), os.getgid())
        assert one.groups == {os.getgid(), *os.getgroups()}


HELLO_FOR_AN_ENTRANCE = pb.AttachRequest(hello=pb.Hello(protocol_version=1, name="test", entrance=True))


def test_a_process_that_asks_for_a_grpc_socket_has_the_way_to_it_until_it_goes(
    room: AttachRoom, tmp_path: Path
) -> None:
    (tmp_path / "way").touch()
    room.entrances.way = os.open(tmp_path / "way", os.O_PATH)
    with room.client() as client:
        client.send(HELLO_FOR_AN_ENTRANCE)
        response, [descriptor] = client.receive()
        assert response.welcome.instance_id == "instance-1"
        assert os.path.samestat(os.fstat(descriptor), os.stat(tmp_path / "way"))
        os.close(descriptor)
        assert room.entrances.open_for == {"instance-1": Process(os.getuid(), str(os.getpid()))}
        assert client.ask(GOODBYE).HasField("accepted")
        assert client.closed_by_broker()
        assert room.entrances.open_for == {}
    os.close(room.entrances.way)


def test_a_process_of_an_older_client_gets_no_descriptor_that_it_would_leave_open(room: AttachRoom) -> None:
    with room.instance():
        assert room.entrances.open_for == {}


def test_a_broker_that_has_no_socket_to_give_attaches_the_process_all_the_same(room: AttachRoom) -> None:
    room.entrances.error = OSError(errno.ENOSPC, "no space")
    with room.client() as client:
        assert client.ask(HELLO_FOR_AN_ENTRANCE).HasField("welcome")
        assert client.ask(WITHDRAW).HasField("accepted")


@pytest.mark.parametrize("request_", [WITHDRAW, CLAIM, GOODBYE])
def test_whoever_does_not_begin_with_hello_is_sent_away(room: AttachRoom, request_: pb.AttachRequest) -> None:
    with room.client() as client:
        assert refused(client.ask(request_)) == (Reason.NOT_ATTACHED, "the first packet must be Hello")
        assert client.closed_by_broker()
    assert room.attendance.events == []


@pytest.mark.parametrize(
    ("hello", "field"),
    [
        (pb.Hello(), "hello.protocol_version"),
        (pb.Hello(protocol_version=2), "hello.protocol_version"),
        (pb.Hello(protocol_version=1, name="x" * 129), "hello.name"),
        (pb.Hello(protocol_version=1, name="two\nlines"), "hello.name"),
        (pb.Hello(protocol_version=1, client_version="x" * 65), "hello.client_version"),
    ],
)
def test_a_wrong_hello_is_refused_by_field(room: AttachRoom, hello: pb.Hello, field: str) -> None:
    with room.client() as client:
        reason, message = refused(client.ask(pb.AttachRequest(hello=hello)))
        assert reason == Reason.INVALID_ARGUMENT
        assert message.startswith(f"{field} is ")
        assert client.closed_by_broker()
    assert room.attendance.events == []


def test_a_second_hello_is_refused_and_the_instance_stays(room: AttachRoom) -> None:
    with room.instance() as client:
        assert refused(client.ask(HELLO))[0] == Reason.INVALID_ARGUMENT
        assert client.ask(WITHDRAW).HasField("accepted")


def test_a_refusal_by_the_broker_reaches_the_client(room: AttachRoom) -> None:
    room.attendance.refuse(BrokerUnavailable("draining", reason=Reason.DRAINING))
    with room.client() as client:
        assert refused(client.ask(HELLO)) == (Reason.DRAINING, "draining")
        assert client.closed_by_broker()


def test_a_defect_in_the_broker_leaks_nothing_and_costs_no_attachment(room: AttachRoom) -> None:
    with room.instance() as client:
        room.attendance.error = ValueError("secret /etc/path")
        assert refused(client.ask(WITHDRAW)) == (Reason.INTERNAL, "internal error")
        room.attendance.error = None
        assert client.ask(WITHDRAW).HasField("accepted")


def test_an_offered_region_arrives_with_its_memory(room: AttachRoom) -> None:
    descriptor = memfd(b"weights")
    with room.instance() as client:
        assert client.ask(OFFER, (descriptor,)).HasField("accepted")
    os.close(descriptor)
    assert room.attendance.contents == [b"weights"]


def test_a_claimed_region_arrives_and_the_brokers_descriptor_stays_open(room: AttachRoom) -> None:
    room.attendance.lent = memfd(b"weights")
    with room.instance() as client:
        for _ in range(2):
            client.send(CLAIM)
            response, (descriptor,) = client.receive()
            assert response.HasField("accepted")
            assert os.pread(descriptor, 7, 0) == b"weights"
            os.close(descriptor)
    os.close(room.attendance.lent)
    assert ("claim", "instance-1", "transfer-1", "3") in room.attendance.events


@pytest.mark.parametrize(("request_", "count"), [(OFFER, 0), (OFFER, 2), (OFFER, 20), (WITHDRAW, 1), (CLAIM, 3)])
def test_a_wrong_number_of_descriptors_is_refused_and_none_is_kept(
    room: AttachRoom, request_: pb.AttachRequest, count: int
) -> None:
    descriptor = memfd()
    with room.instance() as client:
        before = open_descriptors()
        assert refused(client.ask(request_, (descriptor,) * count))[0] in (
            Reason.INVALID_ARGUMENT,
            Reason.REGION_REFUSED,
        )
        assert open_descriptors() == before
        assert client.ask(OFFER, (descriptor,)).HasField("accepted")
    os.close(descriptor)


@pytest.mark.parametrize("region_id", ["", "x" * 65])
def test_an_id_of_a_wrong_length_is_refused_by_field(room: AttachRoom, region_id: str) -> None:
    with room.instance() as client:
        for request_, field in (
            (pb.AttachRequest(withdraw_region=pb.WithdrawRegion(region_id=region_id)), "withdraw_region.region_id"),
            (pb.AttachRequest(claim_region=pb.ClaimRegion(transfer_id=region_id)), "claim_region.transfer_id"),
        ):
            reason, message = refused(client.ask(request_))
            assert reason == Reason.INVALID_ARGUMENT
            assert message.startswith(field)


@pytest.mark.parametrize(
    "packet", [b"\xff", b"garbage " * 100, b"x" * (MAXIMUM_PACKET_BYTES + 1), b"\xfa\x01\x00", b"\x12\xff\xff"]
)
def test_what_is_not_the_protocol_ends_the_connection(room: AttachRoom, packet: bytes) -> None:
    descriptor = memfd()
    with room.instance() as client:
        reason, message = refused(client.ask(packet, (descriptor,)))
        assert reason == Reason.INVALID_ARGUMENT
        assert message.startswith("packet is ")
        assert client.closed_by_broker()
    os.close(descriptor)
    eventually(lambda: ("disconnected", "instance-1") in room.attendance.events)


REQUESTS = st.one_of(
    st.just(HELLO),
    st.builds(
        lambda *fields: pb.AttachRequest(offer_region=pb.OfferRegion(region_id=fields[0], size_bytes=fields[1])),
        st.text(max_size=70),
        st.integers(0, 2**64 - 1),
    ),
    st.builds(lambda text: pb.AttachRequest(withdraw_region=pb.WithdrawRegion(region_id=text)), st.text(max_size=70)),
    st.builds(
        lambda text, index: pb.AttachRequest(claim_region=pb.ClaimRegion(transfer_id=text, region_index=index)),
        st.text(max_size=70),
        st.integers(0, 2**32 - 1),
    ),
)
PACKETS = st.binary(max_size=60) | REQUESTS.map(lambda request_: request_.SerializeToString())


@given(conversation=st.lists(st.tuples(PACKETS, st.integers(0, 3)), max_size=6))
# One server lives through all examples: that is the point.
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_packet_harms_the_server(room: AttachRoom, conversation: list[tuple[bytes, int]]) -> None:
    descriptor = memfd()
    # The server hangs up as soon as it has heard enough.
    with room.client() as client, suppress(BrokenPipeError, ConnectionResetError):
        for packet, count in conversation:
            client.send(packet, (descriptor,) * count)
    os.close(descriptor)
    with room.instance() as client:
        assert client.ask(GOODBYE).HasField("accepted")


def test_a_killed_process_departs(
    room: AttachRoom, start_child: Callable[[str], tuple[subprocess.Popen[str], str]]
) -> None:
    child, _ = start_child("stay")
    child.send_signal(signal.SIGKILL)
    eventually(lambda: ("departed", "instance-1", "the process ended") in room.attendance.events)


def test_death_is_noticed_although_a_forked_child_keeps_the_connection_open(
    room: AttachRoom, start_child: Callable[[str], tuple[subprocess.Popen[str], str]]
) -> None:
    parent, grandchild = start_child("fork")
    try:
        parent.send_signal(signal.SIGKILL)
        eventually(lambda: ("departed", "instance-1", "the process ended") in room.attendance.events)
        assert ("disconnected", "instance-1") not in room.attendance.events
    finally:
        os.kill(int(grandchild), signal.SIGKILL)


def test_a_closed_connection_is_not_a_death_but_the_death_after_it_is(
    room: AttachRoom, start_child: Callable[[str], tuple[subprocess.Popen[str], str]]
) -> None:
    child, _ = start_child("close")
    eventually(lambda: ("disconnected", "instance-1") in room.attendance.events)
    assert not [event for event in room.attendance.events if event[0] == "departed"]
    child.send_signal(signal.SIGKILL)
    eventually(lambda: ("departed", "instance-1", "the process ended") in room.attendance.events)


def test_goodbye_is_acted_on_before_it_is_answered_and_only_once(room: AttachRoom) -> None:
    with room.instance() as client:
        assert client.ask(GOODBYE).HasField("accepted")
        assert room.attendance.events[-1] == ("departed", "instance-1", "it said goodbye")
        assert client.closed_by_broker()
    with room.instance():
        assert [event[0] for event in room.attendance.events] == ["attach", "departed", "attach"]


def test_goodbye_counts_although_earlier_answers_were_never_read(room: AttachRoom) -> None:
    with room.instance() as client:
        client.send(WITHDRAW)
        eventually(lambda: room.attendance.events[-1][0] == "withdraw")
        client.send(GOODBYE)
    eventually(lambda: ("departed", "instance-1", "it said goodbye") in room.attendance.events)


def test_goodbye_counts_although_the_answer_before_it_finds_nobody(room: AttachRoom) -> None:
    with room.client() as client:
        assert client.ask(HELLO).HasField("welcome")
        for request in (WITHDRAW, GOODBYE):
            client.socket.send(request.SerializeToString())
        client.socket.shutdown(socket.SHUT_RDWR)
        eventually(lambda: ("departed", "instance-1", "it said goodbye") in room.attendance.events)


def test_a_defect_in_the_broker_does_not_end_the_watch_over_others(room: AttachRoom) -> None:
    with room.instance() as first, room.instance() as second:
        room.attendance.error = ValueError("defect")
        first.socket.close()
        eventually(lambda: ("disconnected", "instance-1") in room.attendance.events)
        room.attendance.error = None
        assert second.ask(WITHDRAW).HasField("accepted")


def test_a_client_that_never_reads_loses_its_connection_and_costs_nobody_time(room: AttachRoom) -> None:
    with room.instance() as deaf, room.instance() as polite:
        sent = 0
        with suppress(BrokenPipeError, ConnectionResetError):
            while sent < 100_000:
                deaf.send(WITHDRAW)
                sent += 1
                if sent % 50 == 0:
                    assert polite.ask(WITHDRAW).HasField("accepted")
        assert sent < 100_000
        eventually(lambda: ("disconnected", "instance-1") in room.attendance.events)
        assert polite.ask(WITHDRAW).HasField("accepted")


def test_a_stranger_who_says_nothing_is_closed(room: AttachRoom, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HELLO_SECONDS", 0.05)
    with room.client() as silent, room.instance() as instance:
        assert silent.closed_by_broker()
        assert instance.ask(WITHDRAW).HasField("accepted")


def test_a_crowd_of_strangers_keeps_no_instance_out(room: AttachRoom, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strangers, "MAXIMUM_STRANGERS", 3)
    with ExitStack() as stack:
        crowd = [stack.enter_context(room.client()) for _ in range(10)]
        instance = stack.enter_context(room.instance())
        assert crowd[0].closed_by_broker()
        assert instance.ask(WITHDRAW).HasField("accepted")


def test_without_descriptors_the_server_waits_without_spinning(
    room: AttachRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[tuple[float, Callable[[], None]]] = []
    out_of_files = threading.Event()

    def pause(seconds: float, resume: Callable[[], None]) -> None:
        pauses.append((seconds, resume))
        out_of_files.set()

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.settimeout(60)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            with monkeypatch.context() as patched:
                patched.setattr(room.loop, "call_later", pause)
                client.connect(str(room.path))
                client.send(HELLO.SerializeToString())
                assert out_of_files.wait(60)
                room.turn()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        [(seconds, resume)] = pauses
        assert seconds == 1.0, "until then it does not try"
        room.loop.call_soon_threadsafe(resume)
        assert pb.AttachResponse.FromString(client.recv(4096)).HasField("welcome")


def test_a_stale_socket_is_replaced(room: AttachRoom, tmp_path: Path) -> None:
    path = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(path))
    second = AttachRoom(path)
    with second.instance() as client:
        assert client.ask(GOODBYE).HasField("accepted")
    second.close()


class TestKernelsBefore6Point5:
    """Without SO_PEERPIDFD the pidfd is opened by number, and a number that changed hands is noticed."""

    @pytest.fixture(autouse=True)
    def without_peer_pidfd(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(peer, "SO_PEERPIDFD", 12_345)

    def test_death_is_noticed(
        self, room: AttachRoom, start_child: Callable[[str], tuple[subprocess.Popen[str], str]]
    ) -> None:
        child, _ = start_child("stay")
        child.send_signal(signal.SIGKILL)
        eventually(lambda: ("departed", "instance-1", "the process ended") in room.attendance.events)

    @pytest.fixture
    def pair(self) -> Iterator[tuple[socket.socket, socket.socket]]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            yield ours, theirs

    def test_a_living_peer_is_found(self, pair: tuple[socket.socket, socket.socket]) -> None:
        pidfd = peer.open_pidfd(pair[0], peer.credentials(pair[0]))
        os.close(pidfd)

    def test_another_users_process_under_the_number_is_refused(self, pair: tuple[socket.socket, socket.socket]) -> None:
        stranger = peer.PeerCredentials(os.getpid(), os.getuid() + 1, os.getgid(), frozenset())
        with pytest.raises(NotAttached):
            peer.open_pidfd(pair[0], stranger)

    def test_a_number_whose_socket_is_closed_is_refused(self, pair: tuple[socket.socket, socket.socket]) -> None:
        credentials = peer.credentials(pair[0])
        pair[1].close()
        with pytest.raises(NotAttached):
            peer.open_pidfd(pair[0], credentials)

    @pytest.mark.parametrize("pid", [0, 2**22 + 1])
    def test_a_process_that_cannot_be_seen_is_refused_with_what_to_do(
        self, pair: tuple[socket.socket, socket.socket], pid: int
    ) -> None:
        with pytest.raises(NotAttached, match="hostPID: true"):
            peer.open_pidfd(pair[0], peer.PeerCredentials(pid, os.getuid(), os.getgid(), frozenset()))

    def test_a_broker_without_a_descriptor_does_not_blame_the_process(
        self, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        credentials = peer.credentials(pair[0])
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            with pytest.raises(BrokerUnavailable, match="LimitNOFILE"):
                peer.open_pidfd(pair[0], credentials)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
