"""The Administration service for a command: attaches first, so that the broker learns the caller from the kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import grpc

from weight_broker.connection.attach import AttachConnection
from weight_broker.connection.channel import decode_error, open_channel
from weight_broker.errors import BrokerError, Reason
from weight_broker.runtime_directory import ATTACH_SOCKET, runtime_directory
from weight_broker.v1.administration_service_pb2_grpc import AdministrationServiceStub
from weight_broker.wire import TOKEN_METADATA_KEY

Answer = TypeVar("Answer")
Metadata = tuple[tuple[str, bytes], ...]

_CONNECT_SECONDS = 10.0


class Administration:
    """The service's calls, with the session token of this process."""

    def __init__(self, channel: grpc.Channel, token: bytes) -> None:
        self._stub = AdministrationServiceStub(channel)
        self._metadata: Metadata = ((TOKEN_METADATA_KEY, token),)

    def call(
        self,
        ask: Callable[[AdministrationServiceStub, Metadata], Answer],
        *,
        on_deadline: Reason = Reason.BROKER_UNAVAILABLE,
    ) -> Answer:
        """The result of `ask`. Failures raise the `BrokerError` tree."""
        try:
            return ask(self._stub, self._metadata)
        except grpc.RpcError as error:
            raise decode_error(error, on_deadline=on_deadline) from error


@contextmanager
def administration(directory: Path | None, command: str) -> Iterator[Administration]:
    """The service of the broker in `directory` (None: the usual places). Meanwhile `command` is shown as the instance's
    name."""
    directory = directory if directory is not None else runtime_directory()
    connection = AttachConnection(directory / ATTACH_SOCKET, f"weight-broker {command}")
    try:
        token = connection.connect(_CONNECT_SECONDS).session_token
        channel = open_channel(connection.grpc_socket)
        try:
            yield Administration(channel, token)
        finally:
            channel.close()
        with contextlib.suppress(BrokerError):  # the work is done; a failed goodbye changes nothing
            connection.goodbye()
    finally:
        connection.close()
