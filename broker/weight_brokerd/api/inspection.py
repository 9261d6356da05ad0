"""InspectionService: what operators read."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Iterable, Iterator
from itertools import islice
from typing import Any

import grpc

from weight_broker.errors import InvalidArgument, WeightsNotFound
from weight_broker.v1 import inspection_service_pb2 as pb
from weight_broker.v1 import resources_pb2
from weight_broker.v1.inspection_service_pb2_grpc import InspectionServiceServicer
from weight_broker.wire import key_from_wire, layout_from_wire, layout_to_wire
from weight_brokerd import __version__
from weight_brokerd.api import validation
from weight_brokerd.api.ending import on_end
from weight_brokerd.api.messages import Messages
from weight_brokerd.api.paging import Listing, page
from weight_brokerd.core.explain import explain
from weight_brokerd.driver import Driver
from weight_brokerd.watch import Changes

Context = grpc.aio.ServicerContext[Any, Any]

CHANGES_PER_MESSAGE = 500
MAXIMUM_UINT64 = (1 << 64) - 1


def host_message(driver: Driver, messages: Messages) -> resources_pb2.Host:
    """The broker and its host."""
    counts = driver.counts()
    return resources_pb2.Host(
        host_id=driver.coordinator.host_id,
        hostname=socket.gethostname(),
        version=__version__,
        pid=os.getpid(),
        start_time=messages.time(driver.started_at),
        draining=driver.coordinator.draining,
        directory=driver.directory.name,
        instance_count=counts.instances,
        publication_count=counts.publications,
        region_count=counts.regions,
        region_bytes=min(counts.region_bytes, MAXIMUM_UINT64),
        running_transfer_count=counts.running_transfers,
        waiting_acquisition_count=counts.waiting_acquisitions,
        cold_load_lease_count=counts.cold_load_leases,
    )


class InspectionServicer(InspectionServiceServicer):
    """Reads the coordinator's state."""

    def __init__(self, driver: Driver, messages: Messages) -> None:
        self._driver = driver
        self._messages = messages

    async def ListWeightSets(self, request: pb.ListWeightSetsRequest, context: Context) -> pb.ListWeightSetsResponse:
        """See the proto."""
        weight_sets = self._driver.coordinator.weight_sets
        of_model = weight_sets.of_model(request.model)
        ids = [record.key.id for record in of_model] if request.model else weight_sets.ids()
        chosen, token = page(Listing.WEIGHT_SETS, ids, request.page_size, request.page_token)
        records = [record for record in map(weight_sets.find, chosen) if record is not None]
        return pb.ListWeightSetsResponse(
            weight_sets=[self._messages.weight_set(record) for record in records], next_page_token=token
        )

    async def GetWeightSet(self, request: pb.GetWeightSetRequest, context: Context) -> pb.GetWeightSetResponse:
        """See the proto."""
        weight_set_id = validation.weight_set_id("weight_set_id", request.weight_set_id)
        record = self._driver.coordinator.weight_sets.find(weight_set_id)
        if record is None:
            raise WeightsNotFound(
                f"weight set {weight_set_id} is neither published nor being loaded nor waited for",
                metadata={"weight_set_id": weight_set_id},
            )
        publications = self._driver.coordinator.registry.of_weight_set(weight_set_id)
        layout = layout_to_wire(publications[-1].layout) if publications else None
        return pb.GetWeightSetResponse(weight_set=self._messages.weight_set(record), layout=layout)

    async def ListInstances(self, request: pb.ListInstancesRequest, context: Context) -> pb.ListInstancesResponse:
        """See the proto."""
        instances = self._driver.coordinator.instances
        chosen, token = page(Listing.INSTANCES, sorted(instances), request.page_size, request.page_token)
        return pb.ListInstancesResponse(
            instances=[self._messages.instance(instances[instance_id]) for instance_id in chosen],
            next_page_token=token,
        )

    async def ListTransfers(self, request: pb.ListTransfersRequest, context: Context) -> pb.ListTransfersResponse:
        """See the proto."""
        transfers = {
            one.transfer_id: one
            for one in self._driver.coordinator.transfers.newest_first(running_only=request.running_only)
        }
        chosen, token = page(Listing.TRANSFERS, list(transfers), request.page_size, request.page_token)
        return pb.ListTransfersResponse(
            transfers=[self._messages.transfer(transfers[transfer_id]) for transfer_id in chosen],
            next_page_token=token,
        )

    async def GetHost(self, request: pb.GetHostRequest, context: Context) -> pb.GetHostResponse:
        """See the proto."""
        return pb.GetHostResponse(host=host_message(self._driver, self._messages))

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        """See the proto."""
        key = None
        match request.WhichOneof("weight_set"):
            case "key":
                key = key_from_wire(request.key)
                weight_set_id = key.id
            case "weight_set_id":
                weight_set_id = validation.weight_set_id("weight_set_id", request.weight_set_id)
            case _:
                raise InvalidArgument("weight_set", None, "key or weight_set_id")
        layout = layout_from_wire(request.layout) if request.HasField("layout") else None
        return self._messages.explanation(
            explain(self._driver.coordinator, weight_set_id=weight_set_id, key=key, layout=layout)
        )

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.WatchResponse]:
        """See the proto."""
        watcher = self._driver.watch.open()
        on_end(context, lambda: self._driver.watch.leave(watcher))
        for part in self._snapshot():
            yield part
        while not watcher.closed:
            changes = await watcher.next()
            if changes.too_many:
                for part in self._snapshot():
                    yield part
                continue
            for some in _parts(self._changed(changes)):
                if some:
                    yield pb.WatchResponse(changes=some)

    def _snapshot(self) -> list[pb.WatchResponse]:
        """The full state, taken at once: what changes while it is sent comes after it."""
        parts = list(_parts(self._everything()))
        return [
            pb.WatchResponse(
                snapshot=True, snapshot_start=index == 0, snapshot_end=index == len(parts) - 1, changes=part
            )
            for index, part in enumerate(parts)
        ]

    def _everything(self) -> Iterator[pb.Change]:
        core = self._driver.coordinator
        for record in list(core.weight_sets):
            yield pb.Change(weight_set=self._messages.weight_set(record))
        for instance in list(core.instances.values()):
            yield pb.Change(instance=self._messages.instance(instance))
        for transfer in core.transfers.newest_first(running_only=True):
            yield pb.Change(transfer=self._messages.transfer(transfer))

    def _changed(self, changes: Changes) -> Iterator[pb.Change]:
        core = self._driver.coordinator
        for weight_set_id in changes.weight_sets:
            record = core.weight_sets.find(weight_set_id)
            if record is None:
                yield pb.Change(removed_weight_set_id=weight_set_id)
            else:
                yield pb.Change(weight_set=self._messages.weight_set(record))
        for instance_id in changes.instances:
            instance = core.instances.get(instance_id)
            if instance is None:
                yield pb.Change(removed_instance_id=instance_id)
            else:
                yield pb.Change(instance=self._messages.instance(instance))
        for transfer in changes.transfers.values():
            yield pb.Change(transfer=self._messages.transfer(transfer))


def _parts(changes: Iterable[pb.Change]) -> Iterator[list[pb.Change]]:
    """The changes in messages of bounded size; one empty part if there are none."""
    iterator = iter(changes)
    part = list(islice(iterator, CHANGES_PER_MESSAGE))
    yield part
    while part := list(islice(iterator, CHANGES_PER_MESSAGE)):
        yield part
