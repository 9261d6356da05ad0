"""An acquisition that waits says for what, since when, and again and again; one that does not is quiet."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.scripted_broker import done
from support.scripted_stage import KEY, Stage, arrays
from support.waiting import eventually
from weight_broker.transfers import waiting_log
from weight_broker.v1 import resources_pb2
from weight_broker.v1 import weight_broker_service_pb2 as pb


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    prepared = Stage(tmp_path, monkeypatch)
    yield prepared
    prepared.close()


def cold_load(seconds: int) -> pb.AcquireResponse:
    lease = resources_pb2.ColdLoadLease(instance_id="instance-7", instance_name="engine")
    lease.age.FromSeconds(seconds)
    return pb.AcquireResponse(waiting=pb.Waiting(reason=pb.Waiting.REASON_COLD_LOAD, cold_load_lease=lease))


def waiting_threads() -> int:
    return sum(thread.name == "weight-broker-waiting" for thread in threading.enumerate())


def test_who_loads_since_when_and_again_while_it_lasts(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="weight_broker")
    monkeypatch.setattr(waiting_log, "_REPEAT_SECONDS", 0.01)

    def until_said_again() -> None:
        eventually(lambda: sum("still waiting" in record.message for record in caplog.records) >= 2)

    stage.script(
        cold_load(95), cold_load(95), until_said_again, stage.grant("transfer-1", stage.sound), done("transfer-1", 1)
    )
    stage.client.acquire(KEY, arrays(0))
    said = [record for record in caplog.records if "waiting for" in record.message]
    assert [record.levelname for record in said[:2]] == ["INFO", "WARNING"]
    for record in said:
        assert "model: " in record.message
        assert "the load from disk by engine (instance-7) (began 9" in record.message
    assert sum(record.levelname == "INFO" for record in said) == 1, "the same wait is not announced twice"
    eventually(lambda: waiting_threads() == 0)


@pytest.mark.parametrize("reason", [value for name, value in pb.Waiting.Reason.items() if value])
def test_every_reason_has_words(reason: pb.Waiting.Reason.ValueType) -> None:
    assert not waiting_log._wait_of(pb.Waiting(reason=reason)).what.startswith("REASON_")


def test_a_reason_of_a_newer_broker_is_said_as_it_comes() -> None:
    waiting = pb.Waiting()
    waiting.MergeFromString(b"\x08\x63")
    assert waiting_log._wait_of(waiting).what == "reason 99"
