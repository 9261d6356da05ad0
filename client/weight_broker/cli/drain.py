"""`weight-broker drain`: stop granting new work and wait until no transfer runs. For administrators."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
from typing import Protocol

import grpc
from google.protobuf.duration_pb2 import Duration

from weight_broker.cli import output
from weight_broker.cli.administration import administration
from weight_broker.cli.failure import ExitCode
from weight_broker.cli.inspector import Inspector
from weight_broker.cli.progress import Progress
from weight_broker.cli.status import host_line
from weight_broker.errors import BrokerError, Reason
from weight_broker.v1 import administration_service_pb2 as pb

# The broker answers at the request's deadline; the grace bounds a broker that does not answer at all.
_GRACE_SECONDS = 10.0
_LONGEST_DRAIN_SECONDS = 24 * 3600.0
_MOMENT_SECONDS = 1.0


class _Call(Protocol):
    def result(self, timeout: float | None = None) -> pb.DrainResponse: ...

    def cancel(self) -> bool: ...


def run(options: argparse.Namespace) -> ExitCode:
    """Raises `DrainTimeout` if transfers still run at the end."""
    request = pb.DrainRequest()
    limit = _LONGEST_DRAIN_SECONDS
    if options.timeout is not None:
        request.timeout.CopyFrom(_duration(options.timeout))
        limit = options.timeout
    with administration(options.runtime_directory, "drain") as service:
        answer = service.call(
            lambda stub, who: _answer(
                stub.Drain.future(request, timeout=limit + _GRACE_SECONDS, metadata=who), options
            ),
            on_deadline=Reason.DRAIN_TIMEOUT,
        )
    if options.json:
        output.print_json({"host": output.message_to_json(answer.host)})
    else:
        print(f"drained. {host_line(answer.host)}")
    return ExitCode.DONE


def _answer(call: _Call, options: argparse.Namespace) -> pb.DrainResponse:
    """Wait for the answer; after a second, show the running transfers. Ctrl-C ends the call."""
    try:
        with contextlib.suppress(grpc.FutureTimeoutError):
            return call.result(_MOMENT_SECONDS)
        with Progress(quiet=options.json or not _has_rich()).step("draining") as show:
            while True:
                show(_running(options))
                with contextlib.suppress(grpc.FutureTimeoutError):
                    return call.result(_MOMENT_SECONDS)
    finally:
        call.cancel()


def _running(options: argparse.Namespace) -> str:
    try:
        with Inspector(options.runtime_directory, _MOMENT_SECONDS) as inspector:
            return f"draining: {inspector.host().running_transfer_count} transfers running"
    except BrokerError:  # only the drain's own answer decides
        return "draining"


def _has_rich() -> bool:
    return importlib.util.find_spec("rich") is not None


def _duration(seconds: float) -> Duration:
    return Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))
