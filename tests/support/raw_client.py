"""An instance without `weight_broker.client`: the attach socket and the stubs, so that a test can send anything."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from google.protobuf.message import Message

from support.sealed_memory import ALL_SEALS
from weight_broker.digest import ContentDigests, DigestAlgorithm, DigestCoverage
from weight_broker.key import WeightSetKey
from weight_broker.layout import Layout, TensorSpec
from weight_broker.v1 import attach_pb2, resources_pb2, weight_set_pb2
from weight_broker.v1 import weight_broker_service_pb2 as pb
from weight_broker.v1.administration_service_pb2_grpc import AdministrationServiceStub
from weight_broker.v1.inspection_service_pb2_grpc import InspectionServiceStub
from weight_broker.v1.weight_broker_service_pb2_grpc import WeightBrokerServiceStub
from weight_broker.wire import digests_to_wire, key_to_wire, layout_to_wire

TOKEN = "weight-broker-session-bin"
REGION_BYTES = 4096
LAYOUT = Layout(
    [
        TensorSpec("bias", "float32", (4,), (1,), 16),
        TensorSpec("empty", "int8", (0,), (1,), 0),
        TensorSpec("head", "float16", (4, 8), (8, 1), 64, alias_of="embedding"),
        TensorSpec("embedding", "float16", (4, 8), (8, 1), 64),
    ]
)
"""Tiny, with a tied and an empty tensor."""
OFFSETS = {"bias": 64, "embedding": 0, "empty": 0, "head": 0}
DIGESTS = ContentDigests(DigestAlgorithm.CRC32, DigestCoverage.SAMPLED, 4096, (1, 2, 0, 0))


class RawClient:
    """One attached instance. In a test several may live in one process: the broker tells them apart by connection."""

    def __init__(self, runtime_directory: Path, name: str = "raw") -> None:
        self.connection = connect(runtime_directory)
        self.channel = grpc.insecure_channel(
            f"unix:{runtime_directory / 'broker.sock'}", options=[("grpc.use_local_subchannel_pool", 1)]
        )
        self.weight_broker = WeightBrokerServiceStub(self.channel)
        self.inspection = InspectionServiceStub(self.channel)
        self.administration = AdministrationServiceStub(self.channel)
        welcome = self.ask(hello(name)).welcome
        self.instance_id = welcome.instance_id
        self.token = welcome.session_token

    def __enter__(self) -> RawClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def metadata(self) -> tuple[tuple[str, bytes], ...]:
        """What proves to a call who makes it."""
        return ((TOKEN, self.token),)

    def ask(self, request: attach_pb2.AttachRequest, *descriptors: int) -> attach_pb2.AttachResponse:
        """Sends a packet on the attach socket and returns the answer; descriptors that come with it are closed."""
        return exchange(self.connection, request.SerializeToString(), descriptors)

    def offer_region(self, region_id: str, size_bytes: int = REGION_BYTES, *, descriptor: int | None = None) -> str:
        """Offers a region, a sealed memfd of its own if none is given; returns the reason of a refusal or ""."""
        fd = descriptor if descriptor is not None else sealed_memory(size_bytes)
        offer = attach_pb2.OfferRegion(region_id=region_id, size_bytes=size_bytes)
        try:
            return self.ask(attach_pb2.AttachRequest(offer_region=offer), fd).refused.reason
        finally:
            if descriptor is None:
                os.close(fd)

    def withdraw_region(self, region_id: str) -> str:
        """Takes a region back; returns the reason of a refusal or ""."""
        withdrawal = attach_pb2.WithdrawRegion(region_id=region_id)
        return self.ask(attach_pb2.AttachRequest(withdraw_region=withdrawal)).refused.reason

    def publish(
        self, model: str = "model", *, region_id: str = "region", offer: bool = True
    ) -> resources_pb2.Publication:
        """Publishes the tiny layout as a model."""
        if offer:
            assert not self.offer_region(region_id)
        request = publish_request(model, region_id=region_id, request_id=f"publish {model}")
        return self.weight_broker.Publish(request, metadata=self.metadata, timeout=60).publication

    def acquire(self, model: str = "model", *, timeout: float = 20, **fields: Any) -> Any:
        """The stream of an Acquire call."""
        request = acquire_request(model, **fields)
        return self.weight_broker.Acquire(request, metadata=self.metadata, timeout=timeout)

    def report_success(self, transfer_id: str) -> None:
        """Says that a transfer is done."""
        self.weight_broker.ReportTransfer(succeeded(transfer_id), metadata=self.metadata, timeout=60)

    def close(self) -> None:
        """Says goodbye, so that nothing is left of this instance."""
        if self.connection.fileno() >= 0:
            with contextlib.suppress(OSError):  # the broker or the connection is gone already
                self.ask(attach_pb2.AttachRequest(goodbye=attach_pb2.Goodbye()))
        self.disconnect()

    def disconnect(self) -> None:
        """Closes without a word."""
        self.connection.close()
        self.channel.close()


def connect(runtime_directory: Path) -> socket.socket:
    """A connection to the attach socket, of a process that has not said anything yet."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(60)
    while True:
        try:
            connection.connect(str(runtime_directory / "attach.sock"))
        except BlockingIOError:  # the backlog is full, and a socket with a timeout does not wait for it
            time.sleep(0.005)
        else:
            return connection


def exchange(connection: socket.socket, packet: bytes, descriptors: Sequence[int] = ()) -> attach_pb2.AttachResponse:
    """Sends a packet and returns the answer; raises ConnectionResetError if there is none."""
    socket.send_fds(connection, [packet], descriptors)
    answer, received, _, _ = socket.recv_fds(connection, 1 << 16, 4)
    for descriptor in received:
        os.close(descriptor)
    if not answer:
        raise ConnectionResetError("the broker hung up")
    return attach_pb2.AttachResponse.FromString(answer)


def hello(name: str = "raw") -> attach_pb2.AttachRequest:
    """The first packet."""
    return attach_pb2.AttachRequest(hello=attach_pb2.Hello(protocol_version=1, name=name, client_version="test"))


def sealed_memory(size_bytes: int = REGION_BYTES, *, seals: int = ALL_SEALS) -> int:
    """A memfd of zeros; the caller closes it."""
    descriptor = os.memfd_create("raw", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size_bytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def publish_request(
    model: str = "model", *, region_id: str = "region", request_id: str = "request"
) -> pb.PublishRequest:
    """A valid one, for a region that has to be offered."""
    return pb.PublishRequest(
        key=key_to_wire(WeightSetKey(model, engine_attributes={"backend": "x"})),
        layout=layout_to_wire(LAYOUT),
        digests=[digests_to_wire(DIGESTS)],
        regions=[
            weight_set_pb2.Region(
                region_id=region_id,
                device_kind=weight_set_pb2.DEVICE_KIND_CPU,
                size_bytes=REGION_BYTES,
                host_memory=weight_set_pb2.HostMemory(),
            )
        ],
        placements=[weight_set_pb2.TensorPlacement(region_index=0, offset_bytes=OFFSETS[one.name]) for one in LAYOUT],
        request_id=request_id,
    )


def acquire_request(
    model: str = "model", *, if_absent: pb.IfAbsent.ValueType = pb.IF_ABSENT_FAIL, request_id: str = "request"
) -> pb.AcquireRequest:
    """A valid one."""
    return pb.AcquireRequest(
        key=key_to_wire(WeightSetKey(model, engine_attributes={"backend": "x"})),
        layout=layout_to_wire(LAYOUT),
        if_absent=if_absent,
        path=resources_pb2.TRANSFER_PATH_COPY,
        device_kind=weight_set_pb2.DEVICE_KIND_CPU,
        request_id=request_id,
    )


def succeeded(transfer_id: str) -> pb.ReportTransferRequest:
    """A valid report."""
    request = pb.ReportTransferRequest(
        transfer_id=transfer_id,
        succeeded=pb.TransferSucceeded(
            size_bytes=LAYOUT.content_bytes, verified=weight_set_pb2.DIGEST_COVERAGE_SAMPLED
        ),
    )
    phase_time = request.succeeded.phase_times.add(phase=resources_pb2.PHASE_TRANSFER)
    phase_time.duration.FromMilliseconds(5)
    return request


def raw_method(channel: grpc.Channel, method: str, *, streaming: bool) -> Callable[..., Any]:
    """The method with requests as bytes; the answers are bytes too."""
    kind = channel.unary_stream if streaming else channel.unary_unary
    return kind(method, request_serializer=lambda request: request, response_deserializer=lambda response: response)


def copy_of(message: Message) -> Any:
    """A message that can be changed without changing this one."""
    copied = type(message)()
    copied.CopyFrom(message)
    return copied
