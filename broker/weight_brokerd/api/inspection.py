"""InspectionService: listings, explanations and Watch for operators."""

from __future__ import annotations

import asyncio
import base64
import binascii
import bisect
import enum
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from functools import partial
from typing import Any

import grpc

from weight_broker.errors import InvalidArgument, WeightsNotFound
from weight_broker.kinds import kind_of_wire
from weight_broker.v1 import inspection_service_pb2 as pb
from weight_broker.v1 import resources_pb2, weight_set_pb2
from weight_broker.v1.inspection_service_pb2_grpc import InspectionServiceServicer
from weight_broker.wire import key_from_wire
from weight_brokerd import __version__
from weight_brokerd.api import fields as validation
from weight_brokerd.api.caller import on_end
from weight_brokerd.api.incoming.requests import Received
from weight_brokerd.api.incoming.turns import Turns
from weight_brokerd.api.large_grant import add_layout
from weight_brokerd.api.messages import Messages
from weight_brokerd.control.control import Control
from weight_brokerd.core.answers import Question
from weight_brokerd.core.transfers import TransferRecord

Context = grpc.aio.ServicerContext[Any, Any]

DEFAULT_PAGE_SIZE = 100
MAXIMUM_PAGE_SIZE = 1000
CHANGES_PER_MESSAGE = 500
CHANGES_PER_STEP = 50
"""Changes that are built before other calls get their turn. Every publication of a weight set counts."""
PAUSE_SECONDS = 0.05
"""Between two answers of a Watch. What changes meanwhile is in the next one, so that many watchers cost little."""
MAXIMUM_UINT64 = (1 << 64) - 1

_REMOVALS = frozenset({"removed_weight_set_id", "removed_instance_id"})


class Listing(enum.Enum):
    """The lists; a page token of one list is not valid for another."""

    WEIGHT_SETS = "w"
    INSTANCES = "i"
    TRANSFERS = "t"


def host_message(control: Control, messages: Messages) -> resources_pb2.Host:
    """The broker and its host."""
    counts = control.counts()
    kinds = control.kinds
    return resources_pb2.Host(
        host_id=control.coordinator.host_id,
        hostname=socket.gethostname(),
        version=__version__,
        pid=os.getpid(),
        start_time=messages.time(control.ready_at) if control.ready_at is not None else None,
        draining=control.coordinator.draining,
        uptime=messages.since(control.ready_at) if control.ready_at is not None else None,
        directory=control.directory.name,
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
    def __init__(self, control: Control, messages: Messages, turns: Turns) -> None:
        self._control = control
        self._messages = messages
        self._turns = turns

    async def ListWeightSets(self, request: pb.ListWeightSetsRequest, context: Context) -> pb.ListWeightSetsResponse:
        weight_sets = self._control.coordinator.weight_sets
        of_model = weight_sets.of_model(request.model)
        ids = [record.key.id for record in of_model] if request.model else weight_sets.ids()
        chosen, token = _page(Listing.WEIGHT_SETS, ids, request.page_size, request.page_token)
        records = [record for record in map(weight_sets.find, chosen) if record is not None]
        return pb.ListWeightSetsResponse(
            weight_sets=[self._messages.weight_set(record) for record in records], next_page_token=token
        )

    async def GetWeightSet(self, request: pb.GetWeightSetRequest, context: Context) -> pb.GetWeightSetResponse:
        weight_set_id = validation.weight_set_id("weight_set_id", request.weight_set_id)
        record = self._control.coordinator.weight_sets.find(weight_set_id)
        if record is None:
            raise WeightsNotFound(
                f"weight set {weight_set_id} is neither published nor being loaded nor waited for",
                metadata={"weight_set_id": weight_set_id},
            )
        publications = self._control.coordinator.publications.of_weight_set(weight_set_id)
        layout = publications[-1].layout if publications else None
        response = pb.GetWeightSetResponse(weight_set=self._messages.weight_set(record))
        if layout is not None:
            await self._turns.take(add_layout(layout, response.layout))
        return response

    async def ListInstances(self, request: pb.ListInstancesRequest, context: Context) -> pb.ListInstancesResponse:
        instances = self._control.coordinator.instances
        chosen, token = _page(Listing.INSTANCES, sorted(instances), request.page_size, request.page_token)
        return pb.ListInstancesResponse(
            instances=[self._messages.instance(instances[instance_id]) for instance_id in chosen],
            next_page_token=token,
        )

    async def ListTransfers(self, request: pb.ListTransfersRequest, context: Context) -> pb.ListTransfersResponse:
        transfers = {
            transfer.transfer_id: transfer
            for transfer in self._control.coordinator.transfers.newest_first(running_only=request.running_only)
        }
        chosen, token = _page(Listing.TRANSFERS, list(transfers), request.page_size, request.page_token)
        return pb.ListTransfersResponse(
            transfers=[self._messages.transfer(transfers[transfer_id]) for transfer_id in chosen],
            next_page_token=token,
        )

    async def GetHost(self, request: pb.GetHostRequest, context: Context) -> pb.GetHostResponse:
        return pb.GetHostResponse(host=host_message(self._control, self._messages))

    async def Explain(  # type: ignore[override]  # the layout comes decoded
        self, received: Received[pb.ExplainRequest], context: Context
    ) -> pb.ExplainResponse:
        request = received.message
        key = None
        match request.WhichOneof("weight_set"):
            case "key":
                key = key_from_wire(request.key)
                weight_set_id = key.id
            case "weight_set_id":
                weight_set_id = validation.weight_set_id("weight_set_id", request.weight_set_id)
            case _:
                raise InvalidArgument("weight_set", None, "key or weight_set_id")
        kind = self._kind(request.device_kind)
        return self._messages.explanation(
            self._control.coordinator.explain(
                Question(
                    weight_set_id,
                    key,
                    received.layout,
                    kind,
                    other_kinds=validation.other_kinds(request.takes_host_memory, kind),
                )
            )
        )

    def _kind(self, number: weight_set_pb2.DeviceKind.ValueType) -> str:
        """The kind of memory that would receive; empty if the request leaves it open."""
        if number == weight_set_pb2.DEVICE_KIND_UNSPECIFIED:
            return ""
        kind = kind_of_wire(number)
        if kind is None:
            raise InvalidArgument("device_kind", number, "a kind of memory that this version knows, or none")
        return kind

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.WatchResponse]:
        watcher = self._control.watch.open()
        on_end(context, lambda: self._control.watch.leave(watcher))
        async for part in self._snapshot():
            yield part
        while not watcher.closed:
            changes = await watcher.next()
            if changes.too_many:
                async for part in self._snapshot():
                    yield part
                continue
            changed = [
                *(partial(self._weight_set, weight_set_id) for weight_set_id in changes.weight_sets),
                *(partial(self._instance, instance_id) for instance_id in changes.instances),
                *(partial(self._transfer, transfer) for transfer in changes.transfers.values()),
            ]
            for start in range(0, len(changed), CHANGES_PER_MESSAGE):
                yield pb.WatchResponse(changes=await _built(changed[start : start + CHANGES_PER_MESSAGE]))
            await asyncio.sleep(PAUSE_SECONDS)

    async def _snapshot(self) -> AsyncIterator[pb.WatchResponse]:
        """The full state, each thing in its state when its part is built. Things that are gone by then are left out.
        Changes meanwhile are marked for the watcher and follow the snapshot."""
        core = self._control.coordinator
        present = [
            *(partial(self._weight_set, record.key.id) for record in core.weight_sets),
            *(partial(self._instance, instance_id) for instance_id in core.instances),
            *(partial(self._transfer, transfer) for transfer in core.transfers.newest_first(running_only=True)),
        ]
        for start in range(0, max(len(present), 1), CHANGES_PER_MESSAGE):
            end = start + CHANGES_PER_MESSAGE
            part = await _built(present[start:end], existing_only=True)
            yield pb.WatchResponse(
                snapshot=True, snapshot_start=start == 0, snapshot_end=end >= len(present), changes=part
            )

    def _weight_set(self, weight_set_id: str) -> pb.Change:
        record = self._control.coordinator.weight_sets.find(weight_set_id)
        if record is None:
            return pb.Change(removed_weight_set_id=weight_set_id)
        return pb.Change(weight_set=self._messages.weight_set(record))

    def _instance(self, instance_id: str) -> pb.Change:
        instance = self._control.coordinator.instances.get(instance_id)
        if instance is None:
            return pb.Change(removed_instance_id=instance_id)
        return pb.Change(instance=self._messages.instance(instance))

    def _transfer(self, record: TransferRecord) -> pb.Change:
        return pb.Change(transfer=self._messages.transfer(record))


async def _built(changes: Iterable[Callable[[], pb.Change]], *, existing_only: bool = False) -> list[pb.Change]:
    """Build the changes now; other calls get their turn in between."""
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


def _page(listing: Listing, ids: Sequence[str], page_size: int, page_token: str) -> tuple[Sequence[str], str]:
    """The ids of one page and the token of the next. `ids` are sorted; transfers by their number, the newest first. The
    token names the last id of the page before, so members that come and go between two pages neither repeat nor hide
    others. Raises `InvalidArgument`."""
    if not 0 <= page_size <= MAXIMUM_PAGE_SIZE:
        raise InvalidArgument("page_size", page_size, f"0 (for {DEFAULT_PAGE_SIZE}) to {MAXIMUM_PAGE_SIZE}")
    size = page_size or DEFAULT_PAGE_SIZE
    start = 0
    if page_token:
        try:
            start = _start(listing, ids, _last_id(listing, page_token))
        except ValueError:
            raise InvalidArgument(
                "page_token", page_token, "the next_page_token of an earlier answer of the same list, unchanged"
            ) from None
    chosen = ids[start : start + size]
    return chosen, _token(listing, chosen[-1]) if start + size < len(ids) else ""


def _start(listing: Listing, ids: Sequence[str], last: str) -> int:
    if listing is Listing.TRANSFERS:
        return bisect.bisect_right(ids, -_number(last), key=lambda transfer_id: -_number(transfer_id))
    return bisect.bisect_right(ids, last)


def _number(transfer_id: str) -> int:
    return int(transfer_id.rpartition("-")[2])


def _token(listing: Listing, last: str) -> str:
    return base64.urlsafe_b64encode(f"{listing.value}:{last}".encode()).decode()


def _last_id(listing: Listing, token: str) -> str:
    """The id in a token; raises ValueError, also as binascii.Error or UnicodeError, for an invalid token."""
    name, _, last = base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode().partition(":")
    if name != listing.value:
        raise binascii.Error("a token of another list")
    return last
