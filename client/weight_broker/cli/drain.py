"""`weight-broker drain`: stop granting new work and wait until no transfer runs. For administrators."""

from __future__ import annotations

import argparse
import contextlib

import grpc
from google.protobuf.duration_pb2 import Duration

from weight_broker.attach import AttachConnection
from weight_broker.channel import TOKEN_METADATA_KEY, decode_error, open_channel
from weight_broker.cli import output
from weight_broker.cli.failure import ExitCode
from weight_broker.cli.status import host_line
from weight_broker.errors import BrokerError, Reason
from weight_broker.runtime_directory import ATTACH_SOCKET, GRPC_SOCKET, runtime_directory
from weight_broker.v1 import administration_service_pb2 as pb
from weight_broker.v1.administration_service_pb2_grpc import AdministrationServiceStub

# The broker answers at its own deadline; this only bounds a broker that does not answer at all.
_GRACE_SECONDS = 10.0
_CONNECT_SECONDS = 10.0
_LONGEST_DRAIN_SECONDS = 24 * 3600.0


def run(options: argparse.Namespace) -> ExitCode:
    """Drains; `DrainTimeout` if transfers still run at the end."""
    directory = options.runtime_directory if options.runtime_directory is not None else runtime_directory()
    request = pb.DrainRequest()
    limit = _LONGEST_DRAIN_SECONDS
    if options.timeout is not None:
        request.timeout.CopyFrom(_duration(options.timeout))
        limit = options.timeout
    # The kernel tells the broker who asks: that is what the attach socket is for.
    connection = AttachConnection(directory / ATTACH_SOCKET, "weight-broker drain")
    try:
        token = connection.connect(_CONNECT_SECONDS).session_token
        channel = open_channel(directory / GRPC_SOCKET)
        try:
            answer = AdministrationServiceStub(channel).Drain(
                request, timeout=limit + _GRACE_SECONDS, metadata=((TOKEN_METADATA_KEY, token),)
            )
        except grpc.RpcError as error:
            raise decode_error(error, on_deadline=Reason.DRAIN_TIMEOUT) from error
        finally:
            channel.close()
        with contextlib.suppress(BrokerError):  # it has done what was asked; how the parting goes does not matter
            connection.goodbye()
    finally:
        connection.close()
    if options.json:
        output.print_json({"host": output.message_to_json(answer.host)})
    else:
        print(f"drained. {host_line(answer.host)}")
    return ExitCode.DONE


def _duration(seconds: float) -> Duration:
    return Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))
