"""Reads the broker's state over its gRPC socket. Inspection needs no attachment."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

import grpc

from weight_broker.cli.failure import CommandError, ExitCode
from weight_broker.connection.attach import AttachConnection
from weight_broker.connection.channel import decode_error, open_channel
from weight_broker.errors import BrokerError, BrokerUnavailable, Reason
from weight_broker.runtime_directory import ATTACH_SOCKET, GRPC_SOCKET, not_admitted, runtime_directory
from weight_broker.v1 import inspection_service_pb2 as pb
from weight_broker.v1 import resources_pb2
from weight_broker.v1.inspection_service_pb2_grpc import InspectionServiceStub

ID_CHARACTERS = 32
_PAGE_SIZE = 1000

Answer = TypeVar("Answer")
Item = TypeVar("Item")


class _Page(Protocol):
    next_page_token: str


PageAnswer = TypeVar("PageAnswer", bound=_Page)


@dataclass(frozen=True)
class State:
    """The broker's state. Its lists are read one after the other."""

    host: resources_pb2.Host
    weight_sets: list[resources_pb2.WeightSet] = field(default_factory=list)
    instances: list[resources_pb2.Instance] = field(default_factory=list)
    transfers: list[resources_pb2.Transfer] = field(default_factory=list)
    """Newest first."""

    @property
    def leases(self) -> list[resources_pb2.ColdLoadLease]:
        return [entry.cold_load_lease for entry in self.weight_sets if entry.HasField("cold_load_lease")]


class Inspector:
    """The Inspection service behind plain calls. Failures raise the `BrokerError` tree."""

    def __init__(self, directory: Path | None = None, timeout: float = 10.0) -> None:
        self.directory = directory if directory is not None else runtime_directory()
        self._timeout = timeout
        socket_path = self.directory / GRPC_SOCKET
        # gRPC would notice only at the deadline.
        try:
            is_socket = socket_path.is_socket()
        except PermissionError as error:
            raise not_admitted(socket_path) from error
        if not is_socket:
            raise BrokerUnavailable(f"no broker: {socket_path} does not exist")
        if not os.access(socket_path, os.W_OK, effective_ids=True):
            raise not_admitted(socket_path)
        self._attached: AttachConnection | None = None
        self._channel = open_channel(socket_path)
        self._stub = InspectionServiceStub(self._channel)

    def state(self, *, transfer_limit: int = 20) -> State:
        """The whole state, with the newest `transfer_limit` transfers."""
        return State(
            host=self.host(),
            weight_sets=list(self.weight_sets()),
            instances=list(self.instances()),
            transfers=self.transfers(transfer_limit),
        )

    def host(self) -> resources_pb2.Host:
        return self._call(lambda timeout: self._stub.GetHost(pb.GetHostRequest(), timeout=timeout)).host

    def weight_sets(self) -> Iterator[resources_pb2.WeightSet]:
        def ask(token: str, timeout: float) -> pb.ListWeightSetsResponse:
            request = pb.ListWeightSetsRequest(page_size=_PAGE_SIZE, page_token=token)
            return self._stub.ListWeightSets(request, timeout=timeout)

        return self._pages(ask, lambda answer: answer.weight_sets)

    def instances(self) -> Iterator[resources_pb2.Instance]:
        def ask(token: str, timeout: float) -> pb.ListInstancesResponse:
            request = pb.ListInstancesRequest(page_size=_PAGE_SIZE, page_token=token)
            return self._stub.ListInstances(request, timeout=timeout)

        return self._pages(ask, lambda answer: answer.instances)

    def transfers(self, limit: int) -> list[resources_pb2.Transfer]:
        """The newest transfers, at most `limit` (1 to 1000)."""
        request = pb.ListTransfersRequest(page_size=min(limit, _PAGE_SIZE))
        answer = self._call(lambda timeout: self._stub.ListTransfers(request, timeout=timeout))
        return list(answer.transfers)

    def explain(self, request: pb.ExplainRequest) -> pb.ExplainResponse:
        return self._call(lambda timeout: self._stub.Explain(request, timeout=timeout))

    def watch(self) -> Iterator[pb.WatchResponse]:
        """The full state, then changes, until the broker ends."""
        stream = self._stub.Watch(pb.WatchRequest())
        try:
            yield from stream
        except grpc.RpcError as error:
            raise decode_error(error) from error
        finally:
            stream.cancel()

    def resolve(self, prefix: str) -> str:
        """The id of the only weight set whose id starts with `prefix`. A whole id is not looked up."""
        wanted = prefix.lower()
        if not wanted or set(wanted) - set("0123456789abcdef") or len(wanted) > ID_CHARACTERS:
            raise CommandError(f"{prefix!r} is neither a weight set's id nor a key in JSON", ExitCode.USAGE)
        if len(wanted) == ID_CHARACTERS:
            return wanted
        found = [entry.weight_set_id for entry in self.weight_sets() if entry.weight_set_id.startswith(wanted)]
        if not found:
            raise CommandError(f"no weight set's id starts with {wanted}", ExitCode.NOT_FOUND)
        if len(found) > 1:
            raise CommandError(f"{wanted} is the start of {len(found)} ids: {', '.join(found[:4])}", ExitCode.USAGE)
        return found[0]

    def close(self) -> None:
        self._channel.close()
        if self._attached is not None:
            with contextlib.suppress(BrokerError):
                self._attached.goodbye()
            self._attached.close()

    def __enter__(self) -> Inspector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _pages(
        self, ask: Callable[[str, float], PageAnswer], items: Callable[[PageAnswer], Iterable[Item]]
    ) -> Iterator[Item]:
        token = ""
        while True:
            answer = self._call(functools.partial(ask, token))
            yield from items(answer)
            token = answer.next_page_token
            if not token:
                return

    def _call(self, call: Callable[[float], Answer]) -> Answer:
        try:
            return call(self._timeout)
        except grpc.RpcError as error:
            if not self._found_no_room(error) or not self._attach():
                raise decode_error(error, on_deadline=Reason.BROKER_UNAVAILABLE) from error
        return self._call(call)

    def _found_no_room(self, error: grpc.RpcError) -> bool:
        """Whether a flood of connections may fill the backlog, where gRPC does not wait."""
        is_unreachable = isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.UNAVAILABLE
        return is_unreachable and self._attached is None

    def _attach(self) -> bool:
        """Be an instance until the end, for a gRPC socket that no other process can fill. False without a broker."""
        attached = AttachConnection(self.directory / ATTACH_SOCKET, "weight-broker inspection")
        try:
            attached.connect(self._timeout)
        except BrokerError:
            attached.close()
            return False
        self._channel.close()
        self._attached = attached
        self._channel = open_channel(attached.grpc_socket)
        self._stub = InspectionServiceStub(self._channel)
        return True


def age_seconds(seconds_since_epoch: float) -> float:
    """Seconds since then; 0 for a time in the future."""
    return max(time.time() - seconds_since_epoch, 0.0)
