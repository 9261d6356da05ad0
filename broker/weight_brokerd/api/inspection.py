"""InspectionService: what operators read."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from typing import Any

import grpc

from weight_broker.errors import InvalidArgument, WeightsNotFound
from weight_broker.v1 import inspection_service_pb2 as pb
from weight_broker.v1 import resources_pb2
from weight_broker.v1.inspection_service_pb2_grpc import InspectionServiceServicer
from weight_broker.wire import key_from_wire, layout_from_wire, layout_to_wire
from weight_brokerd import __version__
from weight_brokerd.api import fields as validation
from weight_brokerd.api.caller import on_end
from weight_brokerd.api.messages import Messages
from weight_brokerd.api.paging import Listing, page
from weight_brokerd.control.broker import Driver
from weight_brokerd.core.explain import explain
from weight_brokerd.core.model import Transfer

Context = grpc.aio.ServicerContext[Any, Any]

CHANGES_PER_MESSAGE = 500
CHANGES_PER_STEP = 50
"""Changes that are built before others get their turn, a publication of a weight set counted as one."""
MAXIMUM_UINT64 = (1 << 64) - 1

_REMOVALS = frozenset({"removed_weight_set_id", "removed_instance_id"})


def host_message(driver: Driver, messages: Messages) -> resources_pb2.Host:
    """The broker and its host."""
    counts = driver.counts()
    kinds = driver.kinds
    return resources_pb2.Host(
        host_id=driver.coordinator.host_id,
        hostname=socket.gethostname(),
        version=__version__,
        pid=os.getpid(),
        start_time=messages.time(driver.ready_at) if driver.ready_at is not None else None,
        draining=driver.coordinator.draining,
        directory=driver.directory.name,
        instance_count=counts.instances,
        publication_count=counts.publications,
        region_count=counts.regions,
        region_bytes=min(counts.region_bytes, MAXIMUM_UINT64),
        running_transfer_count=counts.running_transfers,
        waiting_acquisition_count=counts.waiting_acquisitions,
        cold_load_lease_count=counts.cold_load_leases,
        cards=[messages.card(kind, health) for kind, health in kinds.health],
        datasystem_worker=next((messages.worker(worker) for worker in kinds.workers), None),
        device_problem=kinds.problem,
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
        async for part in self._snapshot():
            yield part
        while not watcher.closed:
            changes = await watcher.next()
            if changes.too_many:
                async for part in self._snapshot():
                    yield part
                continue
            changed = [
                *(partial(self._weight_set, one) for one in changes.weight_sets),
                *(partial(self._instance, one) for one in changes.instances),
                *(partial(self._transfer, one) for one in changes.transfers.values()),
            ]
            for start in range(0, len(changed), CHANGES_PER_MESSAGE):
                yield pb.WatchResponse(changes=await _built(changed[start : start + CHANGES_PER_MESSAGE]))

    async def _snapshot(self) -> AsyncIterator[pb.WatchResponse]:
        """Everything that there is now, each thing as it is when its part is built. What changes meanwhile has been
        marked for the watcher and comes after it; what is gone by then is left out."""
        core = self._driver.coordinator
        present = [
            *(partial(self._weight_set, one.key.id) for one in core.weight_sets),
            *(partial(self._instance, one) for one in core.instances),
            *(partial(self._transfer, one) for one in core.transfers.newest_first(running_only=True)),
        ]
        for start in range(0, max(len(present), 1), CHANGES_PER_MESSAGE):
            end = start + CHANGES_PER_MESSAGE
            part = await _built(present[start:end], existing_only=True)
            yield pb.WatchResponse(
                snapshot=True, snapshot_start=start == 0, snapshot_end=end >= len(present), changes=part
            )

    def _weight_set(self, weight_set_id: str) -> pb.Change:
        record = self._driver.coordinator.weight_sets.find(weight_set_id)
        if record is None:
            return pb.Change(removed_weight_set_id=weight_set_id)
        return pb.Change(weight_set=self._messages.weight_set(record))

    def _instance(self, instance_id: str) -> pb.Change:
        instance = self._driver.coordinator.instances.get(instance_id)
        if instance is None:
            return pb.Change(removed_instance_id=instance_id)
        return pb.Change(instance=self._messages.instance(instance))

    def _transfer(self, transfer: Transfer) -> pb.Change:
        return pb.Change(transfer=self._messages.transfer(transfer))


async def _built(changes: Iterable[Callable[[], pb.Change]], *, existing_only: bool = False) -> list[pb.Change]:
    """The changes as they are now; others get their turn between them, however many there are."""
    built: list[pb.Change] = []
    weight = 0
    for build in changes:
        change = build()
        if not (existing_only and change.WhichOneof("change") in _REMOVALS):
            built.append(change)
        weight += 1 + len(change.weight_set.publications)
        if weight >= CHANGES_PER_STEP:
            weight = 0
            await asyncio.sleep(0)
    return built
