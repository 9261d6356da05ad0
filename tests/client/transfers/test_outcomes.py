"""What else an acquire call can come to: a lease, a mapping, a broker that has forgotten or will not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from support.scripted_broker import done
from support.scripted_stage import KEY, Stage, arrays, holds
from weight_broker import (
    BrokerClient,
    BrokerUnavailable,
    ColdLoadLease,
    DigestCoverage,
    IntegrityError,
    InvalidArgument,
    LeaseLost,
    Reason,
    TransferFailed,
)
from weight_broker.v1 import resources_pb2
from weight_broker.v1 import weight_broker_service_pb2 as pb


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    prepared = Stage(tmp_path, monkeypatch)
    yield prepared
    prepared.close()


def test_a_cold_load_is_a_lease_that_can_be_given_up_once(stage: Stage) -> None:
    lease_message = resources_pb2.ColdLoadLease(weight_set_id=KEY.id, fencing_token=9)
    stage.script(pb.AcquireResponse(cold_load=pb.ColdLoad(cold_load_lease=lease_message)))
    lease = stage.client.acquire_or_lease(KEY, arrays(0))
    assert isinstance(lease, ColdLoadLease)
    assert (lease.fencing_token, lease.weight_set_id, lease.touched) == (9, KEY.id, False)
    lease.give_up("no disk")
    report = stage.broker.load_reports.get(timeout=60)
    assert (report.fencing_token, report.give_up.reason) == (9, "no disk")
    stage.broker.drop_attachments()
    with pytest.raises(LeaseLost):
        lease.extend()


def test_a_cold_load_after_wrong_bytes_says_touched(stage: Stage) -> None:
    lease_message = resources_pb2.ColdLoadLease(weight_set_id=KEY.id, fencing_token=9)
    stage.script(
        stage.grant("transfer-1", stage.damaged),
        pb.AcquireResponse(cold_load=pb.ColdLoad(cold_load_lease=lease_message)),
    )
    lease = stage.client.acquire_or_lease(KEY, arrays(0))
    assert isinstance(lease, ColdLoadLease)
    assert lease.touched
    assert lease.failure is not None
    assert lease.failure.startswith("IntegrityError")


def test_a_load_from_disk_after_wrong_bytes_says_why_in_its_report(stage: Stage) -> None:
    lease_message = resources_pb2.ColdLoadLease(weight_set_id=KEY.id, fencing_token=9)
    stage.script(
        stage.grant("transfer-1", stage.damaged),
        pb.AcquireResponse(cold_load=pb.ColdLoad(cold_load_lease=lease_message)),
    )
    report = stage.client.acquire_or_load(KEY, arrays(0), lambda: None)
    assert report.source == "disk"
    assert report.acquire_error is not None
    assert report.acquire_error.startswith("IntegrityError")


def test_a_load_whose_first_attempt_failed_says_so_although_the_second_brought_a_lease(stage: Stage) -> None:
    lease_message = resources_pb2.ColdLoadLease(weight_set_id=KEY.id, fencing_token=9)
    with stage.client._load(KEY, timeout=60, publish=True) as load:
        stage.script(stage.grant("transfer-1", stage.damaged), Reason.INTEGRITY_ERROR)
        assert load.map("numpy") is None
        stage.script(pb.AcquireResponse(cold_load=pb.ColdLoad(cold_load_lease=lease_message)))
        assert not load.fill(arrays(0))
    assert load.report.acquire_error is not None
    assert load.report.acquire_error.startswith("IntegrityError")


def test_a_load_whose_second_attempt_succeeds_has_no_error(stage: Stage) -> None:
    with stage.client._load(KEY, timeout=60, publish=True) as load:
        stage.script(stage.grant("transfer-1", stage.damaged), Reason.INTEGRITY_ERROR)
        assert load.map("numpy") is None
        stage.script(stage.grant("transfer-2", stage.sound), done("transfer-2", 3 << 18))
        assert load.fill(arrays(0))
    assert (load.report.source, load.report.acquire_error) == ("peer", None)


def test_a_broker_that_has_forgotten_this_process_is_attached_to_again(stage: Stage) -> None:
    stage.broker.refusals["Acquire"] = [Reason.NOT_ATTACHED]
    stage.script(stage.grant("transfer-1", stage.sound), done("transfer-1", 3 << 18))
    tensors = arrays(0)
    stage.client.acquire(KEY, tensors)
    assert holds(tensors, 5)
    requests = [stage.broker.attach_requests.get(timeout=60) for _ in range(5)]
    assert sorted(requests) == ["claim_region", "end", "goodbye", "hello", "hello"]


def test_a_broker_that_keeps_forgetting_is_not_asked_for_ever(stage: Stage) -> None:
    stage.broker.refusals["Acquire"] = [Reason.NOT_ATTACHED] * 3
    with pytest.raises(BrokerUnavailable, match="does not keep this process attached"):
        stage.client.acquire(KEY, arrays(0))
    assert len(stage.broker.refusals["Acquire"]) == 1


@pytest.mark.parametrize("reason", [Reason.NOT_ATTACHED, Reason.BROKER_UNAVAILABLE])
def test_a_broker_that_is_lost_during_a_transfer_is_a_failed_transfer(stage: Stage, reason: Reason) -> None:
    """Its successor does not know this process, and the tensors are touched: the caller loads them, not the client.
    Which of its connections this process sees end first makes no difference."""
    stage.broker.refusals["ReportTransfer"] = [reason]
    stage.script(stage.grant("transfer-1", stage.damaged), reason)
    with pytest.raises(TransferFailed, match="cut off") as caught:
        stage.client.acquire(KEY, arrays(0))
    assert (caught.value.touched, caught.value.reason) == (True, Reason.TRANSFER_FAILED)
    assert caught.value.metadata["tensors"] == "layers.0"


def test_a_draining_broker_is_unavailable_and_not_asked_twice(stage: Stage) -> None:
    stage.broker.refusals["Acquire"] = [Reason.DRAINING] * 2
    with pytest.raises(BrokerUnavailable) as caught:
        stage.client.acquire(KEY, arrays(0))
    assert caught.value.reason is Reason.DRAINING
    assert len(stage.broker.refusals["Acquire"]) == 1


@pytest.mark.parametrize("digest_mode", ["auto", "full"])
def test_attached_tensors_are_views_that_stay_private(stage: Stage, tmp_path: Path, digest_mode: str) -> None:
    stage.script(stage.grant("transfer-1", stage.sound), done("transfer-1", 3 << 18))
    with BrokerClient(tmp_path, digest_mode=digest_mode) as client:
        attached = client.attach_tensors(KEY, framework="numpy")
    assert len(attached) == 3
    assert (attached["layers.1"] == 5).all()
    assert attached.report.verified is (DigestCoverage.FULL if digest_mode == "full" else DigestCoverage.SAMPLED)
    attached["layers.1"].fill(8)
    again = arrays(0)
    stage.script(stage.grant("transfer-2", stage.sound), done("transfer-2", 3 << 18))
    stage.client.acquire(KEY, again)
    assert holds(again, 5)


def test_damaged_memory_is_not_attached(stage: Stage, tmp_path: Path) -> None:
    stage.script(stage.grant("transfer-1", stage.damaged), Reason.INTEGRITY_ERROR)
    with BrokerClient(tmp_path, digest_mode="full") as client, pytest.raises(IntegrityError) as caught:
        client.attach_tensors(KEY, framework="numpy")
    assert not caught.value.touched
    assert stage.reports[0].failed.cause == pb.TransferFailed.CAUSE_DIGEST_MISMATCH


@pytest.mark.parametrize("framework", ["torch", "numpy"])
def test_without_the_framework_the_broker_is_not_asked(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, framework: Literal["torch", "numpy"]
) -> None:
    monkeypatch.setitem(sys.modules, framework, None)
    with pytest.raises(InvalidArgument, match=f"framework is '{framework}'.* Install {framework}, or use "):
        stage.client.attach_tensors(KEY, framework=framework)
    assert stage.broker.attach_requests.get(timeout=60) == "hello"
    assert not stage.broker.tokens, "the broker was asked for nothing"


def test_after_close_the_client_is_of_no_use(stage: Stage) -> None:
    stage.client.close()
    with pytest.raises(BrokerUnavailable, match="closed"):
        stage.client.acquire(KEY, arrays(0))
