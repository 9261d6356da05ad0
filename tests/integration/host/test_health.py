"""Health as gRPC's own checkers ask for it."""

from __future__ import annotations

import json
import signal
from datetime import datetime

import grpc
import pytest
from grpc_health.v1 import health_pb2 as pb

from support import health
from support.broker_process import BrokerProcess
from support.raw_client import RawClient
from support.rpc_errors import assert_no_defect
from support.scene import SERVICES
from support.waiting import eventually

NAMES = ["", *(f"weight_broker.v1.{name}" for name in SERVICES)]
SERVING, NOT_SERVING = pb.HealthCheckResponse.SERVING, pb.HealthCheckResponse.NOT_SERVING
UNKNOWN = pb.HealthCheckResponse.SERVICE_UNKNOWN


def test_everything_serves_once_the_sockets_accept(broker: BrokerProcess) -> None:
    for name in [*NAMES, "liveness"]:
        assert health.check(broker.channel, name) == SERVING, name


def test_the_host_says_since_when_it_is_ready(broker: BrokerProcess) -> None:
    """Which is not when its process began: between the last socket and what the log says of it."""
    eventually(lambda: '"event": "ready"' in broker.log)  # it is written after the sockets accept
    [logged] = [json.loads(line)["timestamp"] for line in broker.log.splitlines() if '"event": "ready"' in line]
    bound = (broker.runtime_directory / "attach.sock").stat().st_ctime_ns * 1e-9  # of a clock with coarse ticks
    assert bound <= broker.host().start_time.ToNanoseconds() * 1e-9 <= datetime.fromisoformat(logged).timestamp()


def test_a_service_that_does_not_exist_is_not_found(broker: BrokerProcess) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        health.check(broker.channel, "weight_broker.v1.NoService")
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    watch = health.watch(broker.channel, "weight_broker.v1.NoService")
    assert next(watch).status == UNKNOWN
    watch.cancel()


def test_every_watch_turns_to_not_serving_at_sigterm_while_a_transfer_runs(broker: BrokerProcess) -> None:
    """Whoever balances by health sends nobody here any more; the process itself is well and is not to be killed."""
    with RawClient(broker.runtime_directory, "source") as source, RawClient(broker.runtime_directory) as receiver:
        source.publish()
        acquire = receiver.acquire()
        transfer_id = next(acquire).granted.transfer_id
        watches = [health.watch(broker.channel, name) for name in NAMES]
        assert [next(watch).status for watch in watches] == [SERVING] * len(NAMES)
        assert broker.process is not None
        broker.process.send_signal(signal.SIGTERM)
        assert [next(watch).status for watch in watches] == [NOT_SERVING] * len(NAMES)
        assert broker.process.poll() is None, "it waits for the transfer"
        assert health.check(broker.channel, "") == NOT_SERVING
        assert health.check(broker.channel, "liveness") == SERVING
        receiver.report_success(transfer_id)
        assert next(acquire).HasField("done")
        assert broker.process.wait(60) == 0
    assert_no_defect(broker.log)
