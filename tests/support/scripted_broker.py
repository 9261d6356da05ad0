"""A broker that does what a test says, for what a real one cannot be made to do: real sockets, real gRPC, no rules."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage

from weight_broker.errors import ERROR_DOMAIN, TABLE, BrokerError, Reason
from weight_broker.memory import DescribedTensors, HostRegion
from weight_broker.v1 import attach_pb2, resources_pb2, weight_set_pb2
from weight_broker.v1 import weight_broker_service_pb2 as pb
from weight_broker.v1.error_details_pb2 import RpcErrorInfo, RpcStatus
from weight_broker.v1.weight_broker_service_pb2_grpc import (
    WeightBrokerServiceServicer,
    add_WeightBrokerServiceServicer_to_server,
)
from weight_broker.wire import digests_to_wire, layout_to_wire

TOKEN = b"t" * 32
Context = grpc.ServicerContext
AcquireScript = Callable[[pb.AcquireRequest, Context], Iterator[pb.AcquireResponse]]
AttachScript = Callable[[attach_pb2.AttachRequest], attach_pb2.AttachResponse | None]


class ScriptedBroker(WeightBrokerServiceServicer):
    """Set `on_acquire`, `on_attach` and `refusals`, look at what was recorded."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.on_acquire: AcquireScript | None = None
        self.on_attach: AttachScript | None = None
        self.refusals: dict[str, list[Reason | BrokerError]] = {}
        """Reasons or errors with which the next calls of a method fail."""
        self.regions: dict[tuple[str, int], int] = {}
        """Descriptors to be claimed, by transfer id and index."""
        self.entrance = -1
        """A descriptor that goes with Welcome."""
        self.attach_requests: queue.Queue[str] = queue.Queue()
        self.transfer_reports: queue.Queue[pb.ReportTransferRequest] = queue.Queue()
        self.load_reports: queue.Queue[pb.ReportLoadRequest] = queue.Queue()
        self.publish_requests: queue.Queue[pb.PublishRequest] = queue.Queue()
        self.retractions: queue.Queue[str] = queue.Queue()
        self.acquire_ended = threading.Event()
        self.tokens: set[object] = set()
        self._connections: list[socket.socket] = []
        self._stage_connections: list[socket.socket] = []
        self._publication_number = 0
        self._server = grpc.server(ThreadPoolExecutor(4))
        add_WeightBrokerServiceServicer_to_server(self, self._server)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def start(self) -> ScriptedBroker:
        """Binds both sockets."""
        self._server.add_insecure_port(f"unix:{self.directory}/broker.sock")
        self._server.start()
        path = self.directory / "attach.sock"
        path.unlink(missing_ok=True)
        self._listener.bind(str(path))
        self._listener.listen(16)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Is gone, as after a kill: sockets closed, calls ended."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._server.stop(None).wait()
        for connection in self._connections:
            connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._connections.clear()

    def drop_stage_connections(self) -> None:
        """Ends the stage connections only, as a broker does with an instance that is silent."""
        dropped, self._stage_connections = self._stage_connections, []
        for connection in dropped:
            connection.shutdown(socket.SHUT_WR)

    def drop_attachments(self) -> None:
        """Closes the attach connections that there are, and only them."""
        dropped, self._connections = self._connections, []
        for connection in dropped:
            connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def Acquire(self, request: pb.AcquireRequest, context: Context) -> Iterator[pb.AcquireResponse]:  # noqa: N802
        """See the proto."""
        self._check("Acquire", context)
        assert self.on_acquire is not None
        context.add_callback(self.acquire_ended.set)
        yield from self.on_acquire(request, context)

    def ReportTransfer(self, request: pb.ReportTransferRequest, context: Context) -> pb.ReportTransferResponse:  # noqa: N802
        """See the proto."""
        self._check("ReportTransfer", context)
        self.transfer_reports.put(request)
        return pb.ReportTransferResponse()

    def Publish(self, request: pb.PublishRequest, context: Context) -> pb.PublishResponse:  # noqa: N802
        """See the proto."""
        self._check("Publish", context)
        self.publish_requests.put(request)
        self._publication_number += 1
        number = self._publication_number
        return pb.PublishResponse(
            publication=resources_pb2.Publication(publication_id=f"publication-{number}", generation=number)
        )

    def Retract(self, request: pb.RetractRequest, context: Context) -> pb.RetractResponse:  # noqa: N802
        """See the proto."""
        self._check("Retract", context)
        self.retractions.put(request.publication_id)
        return pb.RetractResponse()

    def ReportLoad(self, request: pb.ReportLoadRequest, context: Context) -> pb.ReportLoadResponse:  # noqa: N802
        """See the proto."""
        self._check("ReportLoad", context)
        self.load_reports.put(request)
        return pb.ReportLoadResponse()

    def _check(self, method: str, context: Context) -> None:
        self.tokens.add(dict(context.invocation_metadata()).get("weight-broker-session-bin"))
        refusals = self.refusals.get(method)
        if not refusals:
            return
        refusal = refusals.pop(0)
        if isinstance(refusal, BrokerError):
            fail(context, refusal.reason, refusal.message, **refusal.metadata)
        fail(context, refusal)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            threading.Thread(target=self._converse, args=(connection,), daemon=True).start()

    def _converse(self, connection: socket.socket) -> None:
        while True:
            try:
                packet, descriptors, _, _ = socket.recv_fds(connection, 65536, 1)
            except OSError:
                self.attach_requests.put("end")
                return
            if not packet:
                self.attach_requests.put("end")
                return
            for descriptor in descriptors:
                socket.close(descriptor)
            request = attach_pb2.AttachRequest.FromString(packet)
            self.attach_requests.put(request.WhichOneof("request") or "nothing")
            response = self.on_attach(request) if self.on_attach is not None else None
            sent: list[int] = []
            if response is None:
                response, sent = self._attach_answer(request)
            if request.HasField("serve_stage"):
                self._stage_connections.append(connection)
            with contextlib.suppress(OSError):  # nobody reads it; there may be a goodbye to read all the same
                socket.send_fds(connection, [response.SerializeToString()], sent)

    def _attach_answer(self, request: attach_pb2.AttachRequest) -> tuple[attach_pb2.AttachResponse, list[int]]:
        match request.WhichOneof("request"):
            case "hello":
                welcome = attach_pb2.Welcome(session_token=TOKEN, instance_id="instance-1", host_id="host-1")
                return attach_pb2.AttachResponse(welcome=welcome), [self.entrance] if self.entrance >= 0 else []
            case "claim_region":
                claim = request.claim_region
                descriptor = self.regions.get((claim.transfer_id, claim.region_index))
                if descriptor is None:
                    return refused(Reason.TRANSFER_NOT_FOUND, "no such transfer"), []
                return attach_pb2.AttachResponse(accepted=attach_pb2.Accepted()), [descriptor]
            case _:
                return attach_pb2.AttachResponse(accepted=attach_pb2.Accepted()), []


def refused(reason: str, message: str) -> attach_pb2.AttachResponse:
    """A refusal on the attach socket."""
    return attach_pb2.AttachResponse(refused=attach_pb2.Refused(reason=reason, message=message))


def fail(context: Context, reason: Reason, message: str = "scripted", **metadata: str) -> NoReturn:
    """Ends a call as the real broker does."""
    code: grpc.StatusCode = getattr(grpc.StatusCode, TABLE[reason].code)
    information = RpcErrorInfo(reason=reason, domain=ERROR_DOMAIN, metadata=metadata)
    detail = AnyMessage(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=information.SerializeToString())
    number: Any = code.value
    status = RpcStatus(code=number[0], message=message, details=[detail])
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(code, message)
    raise AssertionError("abort returned")


def granted(transfer_id: str, described: DescribedTensors, region: HostRegion, **fields: Any) -> pb.AcquireResponse:
    """A grant of one region."""
    message = pb.Granted(
        transfer_id=transfer_id,
        source=resources_pb2.Publication(
            publication_id=f"source-of-{transfer_id}", generation=7, instance_id="instance-2", instance_name="peer"
        ),
        data_plane=resources_pb2.DATA_PLANE_LOCAL,
        path=resources_pb2.TRANSFER_PATH_COPY,
        regions=[
            weight_set_pb2.Region(
                region_id="region",
                device_kind=weight_set_pb2.DEVICE_KIND_CPU,
                size_bytes=region.size_bytes,
                host_memory=weight_set_pb2.HostMemory(),
            )
        ],
        placements=[
            weight_set_pb2.TensorPlacement(region_index=index, offset_bytes=offset)
            for index, offset in region.placements
        ],
        digests=[digests_to_wire(digests) for digests in region.digests],
        layout=layout_to_wire(described.layout),
    )
    for name, value in fields.items():
        setattr(message, name, value)
    return pb.AcquireResponse(granted=message)


def done(transfer_id: str, size_bytes: int) -> pb.AcquireResponse:
    """The end: every byte is in place."""
    return pb.AcquireResponse(
        done=pb.Done(report=resources_pb2.TransferReport(transfer_id=transfer_id, size_bytes=size_bytes))
    )
