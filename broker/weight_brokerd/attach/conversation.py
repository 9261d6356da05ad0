"""The requests of one process on the attach socket, and their answers. No sockets here, no event loop."""

from __future__ import annotations

import enum
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import structlog
from google.protobuf.message import DecodeError

from weight_broker.errors import BrokerError, InvalidArgument, NotAttached, Reason
from weight_broker.v1 import attach_pb2 as pb
from weight_brokerd.attach.peer import PeerCredentials
from weight_brokerd.core.model import Process
from weight_brokerd.processes.packets import MAXIMUM_PACKET_BYTES, Packet

PROTOCOL_VERSION = 1
MAXIMUM_NAME_LENGTH = 128
MAXIMUM_IDENTIFIER_LENGTH = 64

_ACCEPTED = pb.AttachResponse(accepted=pb.Accepted())

log = structlog.get_logger("weight_brokerd.attach")


@dataclass(frozen=True, slots=True)
class Session:
    """An attached instance."""

    instance_id: str
    token: bytes
    """Proves in gRPC metadata that a call comes from the instance: 32 random bytes."""
    peer: PeerCredentials


class Attendance(Protocol):
    """Events and requests of the attach socket, for the owner of the instances. Called on the event loop."""

    def attach(self, peer: PeerCredentials, name: str, client_version: str) -> Session:
        """A process introduced itself. Raises `BrokerError` to refuse it."""

    def disconnected(self, instance_id: str) -> None:
        """The connection ended; the process lives, and its memory may be in use."""

    def departed(self, instance_id: str, reason: str) -> None:
        """The process ended or said goodbye. No request of it follows."""

    def offer_region(self, instance_id: str, region_id: str, size_bytes: int, fd: int) -> None:
        """Takes `fd` over in every case. Raises `BrokerError` to refuse the region."""

    def withdraw_region(self, instance_id: str, region_id: str) -> None:
        """Raises `BrokerError` if the instance has no such region."""

    def claim_region(self, instance_id: str, transfer_id: str, region_index: int) -> int:
        """A file descriptor, lent until the call returns to the event loop. Raises `BrokerError`."""

    def stage_owner(self, token: bytes, peer: PeerCredentials) -> str:
        """The instance of a new stage connection. Raises `BrokerError` to refuse it."""

    def stage_connected(self, instance_id: str, connection: socket.socket) -> None:
        """Takes the connection over: from now on the instance answers on it."""


class Entrances(Protocol):
    """gRPC sockets for one process each."""

    def open(self, instance_id: str, process: Process) -> int:
        """A descriptor to connect through, lent until the call returns to the event loop. Raises `OSError`."""

    def close(self, instance_id: str) -> None:
        """The process has gone. Idempotent."""


class After(enum.Enum):
    """What follows an answer."""

    STAY = "stay"
    """The next request."""
    HANG_UP = "hang up"
    """The end of the connection: after another protocol or a refused Hello the process must connect again."""
    DEPART = "depart"
    """The end of the attachment: the process said goodbye."""
    HAND_OVER = "hand over"
    """The connection is a stage connection from now on."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The one response to a request."""

    response: pb.AttachResponse
    after: After = After.STAY
    descriptor: int | None = None
    """Travels with the response; lent."""


class Conversation:
    """One connection, from Hello to Goodbye."""

    def __init__(
        self,
        attendance: Attendance,
        peer: PeerCredentials,
        *,
        host_id: str,
        broker_version: str,
        open_entrance: Callable[[str], int] | None = None,
    ) -> None:
        """`open_entrance`: see `Entrances.open`."""
        self._open_entrance = open_entrance
        self._attendance = attendance
        self._peer = peer
        self._host_id = host_id
        self._broker_version = broker_version
        self.instance_id = ""
        """Set by a Hello that was accepted."""
        self.stage_owner = ""
        """The instance, once this is a stage connection."""

    def answer(self, packet: Packet) -> Answer:
        """Acts on a request. Descriptors that no action took stay in the packet. Never raises."""
        try:
            request = _parse(packet)
        except InvalidArgument as error:
            return Answer(refusal(error), After.HANG_UP)
        try:
            return self._act(request, packet)
        except BrokerError as error:
            return Answer(refusal(error), After.STAY if self.instance_id else After.HANG_UP)
        except Exception:  # the log gets the details, the process an answer without them
            log.exception("attach_request_failed", instance_id=self.instance_id)
            return Answer(refusal(BrokerError("internal error")), After.STAY if self.instance_id else After.HANG_UP)

    def _act(self, request: pb.AttachRequest, packet: Packet) -> Answer:
        kind = request.WhichOneof("request")
        if kind == "hello":
            _expect_descriptors(packet, 0)
            return self._hello(request.hello)
        if kind == "serve_stage":
            _expect_descriptors(packet, 0)
            if self.instance_id:
                raise InvalidArgument("serve_stage", "a packet of an attach connection", "one of a second connection")
            self.stage_owner = self._attendance.stage_owner(request.serve_stage.session_token, self._peer)
            return Answer(_ACCEPTED, After.HAND_OVER)
        if not self.instance_id:
            raise NotAttached("the first packet must be Hello")
        if kind == "offer_region":
            offer = request.offer_region
            _expect_descriptors(packet, 1)
            _check_identifier("offer_region.region_id", offer.region_id)
            self._attendance.offer_region(self.instance_id, offer.region_id, offer.size_bytes, packet.descriptors.pop())
            return Answer(_ACCEPTED)
        _expect_descriptors(packet, 0)
        if kind == "withdraw_region":
            _check_identifier("withdraw_region.region_id", request.withdraw_region.region_id)
            self._attendance.withdraw_region(self.instance_id, request.withdraw_region.region_id)
            return Answer(_ACCEPTED)
        if kind == "claim_region":
            claim = request.claim_region
            _check_identifier("claim_region.transfer_id", claim.transfer_id)
            lent = self._attendance.claim_region(self.instance_id, claim.transfer_id, claim.region_index)
            return Answer(_ACCEPTED, descriptor=lent)
        return Answer(_ACCEPTED, After.DEPART)

    def _hello(self, hello: pb.Hello) -> Answer:
        if self.instance_id:
            raise InvalidArgument("hello", "the second one", "one for each connection")
        if hello.protocol_version != PROTOCOL_VERSION:
            raise InvalidArgument(
                "hello.protocol_version",
                hello.protocol_version,
                str(PROTOCOL_VERSION),
                hint="Client and broker do not fit: install the same version of both",
            )
        if len(hello.name) > MAXIMUM_NAME_LENGTH or not hello.name.isprintable():
            raise InvalidArgument("hello.name", hello.name, f"at most {MAXIMUM_NAME_LENGTH} printable characters")
        if len(hello.client_version) > MAXIMUM_IDENTIFIER_LENGTH or not hello.client_version.isprintable():
            expected = f"at most {MAXIMUM_IDENTIFIER_LENGTH} printable characters"
            raise InvalidArgument("hello.client_version", hello.client_version, expected)
        session = self._attendance.attach(self._peer, hello.name, hello.client_version)
        self.instance_id = session.instance_id
        welcome = pb.Welcome(
            session_token=session.token,
            instance_id=session.instance_id,
            host_id=self._host_id,
            broker_version=self._broker_version,
        )
        return Answer(pb.AttachResponse(welcome=welcome), descriptor=self._entrance() if hello.entrance else None)

    def _entrance(self) -> int | None:
        """None if there is none: the process then uses the socket that all others use."""
        try:
            return self._open_entrance(self.instance_id) if self._open_entrance is not None else None
        except OSError as error:
            log.warning("entrance_not_opened", instance_id=self.instance_id, error=str(error))
            return None


def refusal(error: BrokerError) -> pb.AttachResponse:
    """The error as a response."""
    return pb.AttachResponse(refused=pb.Refused(reason=error.reason, message=error.message))


def _parse(packet: Packet) -> pb.AttachRequest:
    if packet.cut:
        raise InvalidArgument("packet", "longer", f"at most {MAXIMUM_PACKET_BYTES} bytes")
    request = pb.AttachRequest()
    try:
        request.ParseFromString(packet.data)
    except DecodeError as error:
        raise InvalidArgument("packet", packet.data[:32], "an AttachRequest message") from error
    if request.WhichOneof("request") is None:
        raise InvalidArgument("packet", packet.data[:32], "an AttachRequest with a request that this broker knows")
    return request


def _expect_descriptors(packet: Packet, count: int) -> None:
    if packet.descriptors_lost:
        raise BrokerError(
            "the file descriptor did not arrive: the packet carries more than one, or the broker may not open more "
            "files (LimitNOFILE)",
            reason=Reason.REGION_REFUSED,
        )
    if len(packet.descriptors) != count:
        raise InvalidArgument("file descriptors with the packet", len(packet.descriptors), str(count))


def _check_identifier(field: str, value: str) -> None:
    if not 1 <= len(value) <= MAXIMUM_IDENTIFIER_LENGTH:
        raise InvalidArgument(field, value, f"1 to {MAXIMUM_IDENTIFIER_LENGTH} characters")
