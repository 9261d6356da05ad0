"""A broker with something of everything in it, and a valid request for every RPC."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import grpc
from google.protobuf.message import Message

from support.broker_process import BrokerProcess
from support.raw_client import RawClient, acquire_request, publish_request, raw_method, succeeded
from support.rpc_errors import Refusal, refusal_of
from support.waiting import eventually
from weight_broker.v1 import administration_service_pb2 as administration
from weight_broker.v1 import inspection_service_pb2 as inspection
from weight_broker.v1 import resources_pb2
from weight_broker.v1 import weight_broker_service_pb2 as pb
from weight_broker.wire import key_from_wire

SERVICES = {
    "WeightBrokerService": ("Acquire", "ReportTransfer", "Publish", "Retract", "ReportLoad"),
    "AdministrationService": ("Evict", "Quarantine", "Drain"),
    "InspectionService": (
        "ListWeightSets",
        "GetWeightSet",
        "ListInstances",
        "ListTransfers",
        "GetHost",
        "Explain",
        "Watch",
    ),
}
METHODS = {name: f"/weight_broker.v1.{service}/{name}" for service, names in SERVICES.items() for name in names}
"""Every RPC of the broker's own services: its name and its path."""
ATTACHED_ONLY = (*SERVICES["WeightBrokerService"], *SERVICES["AdministrationService"])
"""Those that need a token."""
STREAMS = frozenset({"Acquire", "Watch"})


class Scene:
    """One broker, one instance that publishes, one that does everything else."""

    def __init__(self, broker: BrokerProcess) -> None:
        self.broker = broker
        self.publisher = RawClient(broker.runtime_directory, "publisher")
        self.resident = self.publisher.publish("resident")
        self.client = RawClient(broker.runtime_directory, "client")
        self._acquire: Any = None
        self._transfer_id = ""
        self._fencing_token = 0
        self._own: resources_pb2.Publication | None = None
        self._offered = False

    def __enter__(self) -> Scene:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.client.close()
        self.publisher.close()

    def reset(self) -> None:
        """After a call that was taken: the client's publications, leases and transfers end, the rest is as it was."""
        self.client.close()
        if not any(one.publication_id == self.resident.publication_id for one in self._residents()):
            self.publisher.close()
            self.publisher = RawClient(self.broker.runtime_directory, "publisher")
            self.resident = self.publisher.publish("resident")
        self.client = RawClient(self.broker.runtime_directory, "client")
        self._acquire, self._transfer_id, self._fencing_token, self._own = None, "", 0, None
        self._offered = False

    def state(self) -> tuple[object, ...]:
        """What the broker has, as it tells everybody."""
        host = self.broker.host()
        counts = (
            host.instance_count,
            host.publication_count,
            host.region_count,
            host.region_bytes,
            host.running_transfer_count,
            host.waiting_acquisition_count,
            host.cold_load_lease_count,
            host.draining,
        )
        publications = tuple((one.publication_id, one.state, one.reader_count) for one in self.broker.publications())
        instances = tuple((one.instance_id, one.publication_count) for one in self.broker.instances())
        return counts, publications, instances

    def valid_request(self, name: str) -> Message:
        """A request that would be taken now."""
        return _VALID[name](self)

    def call(self, name: str, request: bytes, *, metadata: Any = None) -> Refusal | None:
        """Makes the call; None if it was taken. Of a stream the first message counts, then the call is given up."""
        method = raw_method(self.client.channel, METHODS[name], streaming=name in STREAMS)
        metadata = self.client.metadata if metadata is None else metadata
        try:
            if name in STREAMS:
                stream = method(request, metadata=metadata, timeout=60)
                next(stream)
                stream.cancel()
            else:
                method(request, metadata=metadata, timeout=60)
        except grpc.RpcError as error:
            return refusal_of(error)
        return None

    def _residents(self) -> list[resources_pb2.Publication]:
        return [one for one in self.broker.publications() if one.state == resources_pb2.Publication.STATE_RESIDENT]

    def _report_transfer(self) -> pb.ReportTransferRequest:
        if not self._transfer_id:
            self._acquire = self.client.acquire("resident", timeout=600)
            self._transfer_id = next(self._acquire).granted.transfer_id
        return succeeded(self._transfer_id)

    def _report_load(self) -> pb.ReportLoadRequest:
        absent = acquire_request("absent", if_absent=pb.IF_ABSENT_LOAD)
        if not self._fencing_token:
            [answer] = self.client.weight_broker.Acquire(absent, metadata=self.client.metadata, timeout=60)
            self._fencing_token = answer.cold_load.cold_load_lease.fencing_token
        request = pb.ReportLoadRequest(weight_set_id=key_from_wire(absent.key).id, fencing_token=self._fencing_token)
        request.extend.duration.seconds = 60
        return request

    def _publish(self) -> pb.PublishRequest:
        if not self._offered:
            assert not self.client.offer_region("scene")
            self._offered = True
        return publish_request("published", region_id="scene")

    def _retract(self) -> pb.RetractRequest:
        if self._own is None:
            self._own = self.client.publish("own", region_id="own")
        return pb.RetractRequest(publication_id=self._own.publication_id)

    def settle(self, within: float = 60.0) -> None:
        """Waits until no transfer runs: the end of a call that was given up takes a moment to arrive."""
        eventually(lambda: not self.broker.host().running_transfer_count, within=within)


def _explain(_: Scene) -> inspection.ExplainRequest:
    request = acquire_request("resident")
    return inspection.ExplainRequest(key=request.key, layout=request.layout)


_VALID: dict[str, Callable[[Scene], Message]] = {
    "Acquire": lambda _: acquire_request("resident"),
    "ReportTransfer": Scene._report_transfer,
    "Publish": Scene._publish,
    "Retract": Scene._retract,
    "ReportLoad": Scene._report_load,
    "Drain": lambda _: administration.DrainRequest(),
    "Evict": lambda scene: administration.EvictRequest(publication_id=scene.resident.publication_id),
    "Quarantine": lambda scene: administration.QuarantineRequest(
        publication_id=scene.resident.publication_id, reason="a test"
    ),
    "ListWeightSets": lambda _: inspection.ListWeightSetsRequest(page_size=10, model="resident"),
    "GetWeightSet": lambda _: inspection.GetWeightSetRequest(
        weight_set_id=key_from_wire(acquire_request("resident").key).id
    ),
    "ListInstances": lambda _: inspection.ListInstancesRequest(page_size=10),
    "ListTransfers": lambda _: inspection.ListTransfersRequest(page_size=10, running_only=True),
    "GetHost": lambda _: inspection.GetHostRequest(),
    "Explain": _explain,
    "Watch": lambda _: inspection.WatchRequest(),
}
