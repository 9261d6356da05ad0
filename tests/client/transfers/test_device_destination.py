"""Device memory that is to be filled, against a scripted broker; the driver is an object."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.device_driver import Acl, tensors
from support.scripted_broker import Context, ScriptedBroker
from weight_broker import BrokerClient, BrokerError, WeightSetKey
from weight_broker.drivers import acl as acl_module
from weight_broker.v1 import resources_pb2
from weight_broker.v1 import weight_broker_service_pb2 as pb

KEY = WeightSetKey("model")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Acl:
    acl = Acl()
    monkeypatch.setattr(acl_module, "load", lambda *_: acl)
    return acl


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[ScriptedBroker]:
    scripted = ScriptedBroker(tmp_path).start()
    yield scripted
    scripted.stop()


def grant_lease(request: pb.AcquireRequest, context: Context) -> Iterator[pb.AcquireResponse]:
    lease: Any = resources_pb2.ColdLoadLease(weight_set_id=KEY.id, fencing_token=9)
    yield pb.AcquireResponse(cold_load=pb.ColdLoad(cold_load_lease=lease))


def test_a_lease_that_comes_with_memory_that_stays_mapped_is_given_up_before_the_error_is_raised(
    broker: ScriptedBroker, driver: Acl
) -> None:
    broker.on_acquire = grant_lease
    driver.is_mapped = True
    with BrokerClient(broker.directory, device_path="direct") as client:
        with pytest.raises(BrokerError) as caught:
            client.acquire_or_lease(KEY, tensors())
        assert (caught.value.touched, caught.value.quiesced) == (True, False)
        report = broker.load_reports.get(timeout=5)
        assert (report.fencing_token, report.WhichOneof("action")) == (9, "give_up")
