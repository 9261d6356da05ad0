"""What a receiver says of a source is checked before anything follows from it, and the log says who said it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import pytest

from support import actions
from support.broker_process import BrokerProcess
from support.instance_process import InstanceProcess
from support.raw_client import RawClient
from support.waiting import eventually
from weight_broker import IntegrityError
from weight_broker.cli.main import main
from weight_broker.v1 import resources_pb2
from weight_broker.v1 import weight_broker_service_pb2 as pb

Start = Callable[..., InstanceProcess]
RESIDENT = resources_pb2.Publication.STATE_RESIDENT


def events(broker: BrokerProcess) -> list[dict[str, object]]:
    """The log."""
    return [json.loads(line) for line in broker.log.splitlines()]


def named(broker: BrokerProcess, name: str) -> list[dict[str, object]]:
    """The events of this name. What is logged comes into the log a moment later."""
    eventually(lambda: any(event["event"] == name for event in events(broker)))
    return [event for event in events(broker) if event["event"] == name]


def judged(broker: BrokerProcess) -> list[dict[str, object]]:
    """The audit events about reports of damage."""
    return [event for event in events(broker) if event["event"] == "judge_damage_report"]


def test_a_false_report_takes_no_source_from_others_and_is_on_record(
    broker: BrokerProcess, start_instance: Start
) -> None:
    publisher, reporter, reader = (start_instance(name) for name in ("publisher", "reporter", "reader"))
    publication_id = publisher.call(actions.publish, "model", 1)
    reporter.call(actions.misread)
    for instance in (reporter, reader):
        instance.call(actions.prepare)
    with pytest.raises(IntegrityError):
        reporter.call(actions.acquire, "model")
    eventually(lambda: len(judged(broker)) == 1)
    [event] = judged(broker)
    assert (event["pid"], event["uid"], event["gid"]) == (reporter.pid, os.getuid(), os.getgid())
    assert (event["publication_id"], event["finding"], event["quarantined"]) == (publication_id, "intact", False)
    assert event["logger"] == "weight_brokerd.audit"
    assert reader.call(actions.acquire, "model").source_instance_name == "publisher"
    assert reader.call(actions.current) == actions.expected(1)
    (source,) = broker.publications()
    assert (source.state, source.being_checked) == (RESIDENT, False)


def test_who_reports_damage_falsely_cannot_become_the_only_source(broker: BrokerProcess, start_instance: Start) -> None:
    publishers = [start_instance(f"publisher-{number}") for number in range(2)]
    reporter, reader = start_instance("reporter"), start_instance("reader")
    for publisher in publishers:
        publisher.call(actions.publish, "model", 1)
    reporter.call(actions.misread)
    reporter.call(actions.prepare)
    with pytest.raises(IntegrityError):
        reporter.call(actions.acquire, "model")
    reporter.call(actions.publish, "model", 2)
    contradiction = named(broker, "contradict_publication")[0]
    assert contradiction["pid"] == reporter.pid
    eventually(lambda: len(judged(broker)) == 2)
    publishers[0].call(actions.retract_all)
    reader.call(actions.prepare)
    for _ in range(2):
        assert reader.call(actions.acquire, "model").source_instance_name == "publisher-1"
        assert reader.call(actions.current) == actions.expected(1)
    assert [publication.state for publication in broker.publications()] == [RESIDENT] * 2


def test_a_receiver_whose_reports_keep_proving_false_is_shown_as_suspect(
    broker: BrokerProcess, start_instance: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        start_instance(f"publisher-{number}").call(actions.publish, "model", 1)
    reporter = start_instance("reporter")
    reporter.call(actions.misread)
    reporter.call(actions.prepare)
    with pytest.raises(IntegrityError):
        reporter.call(actions.acquire, "model")
    eventually(lambda: [one.name for one in broker.instances() if one.suspect] == ["reporter"])
    [suspect] = [one for one in broker.instances() if one.suspect]
    assert suspect.false_damage_reports == 3
    assert named(broker, "receiver_suspect")
    assert main(["status", "--runtime-directory", str(broker.runtime_directory), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in shown["instances"] if one.get("suspect")] == ["reporter"]
    reporter.kill()
    eventually(lambda: not any(one.suspect for one in broker.instances()))


def test_content_that_never_had_its_digests_is_quarantined_after_one_report(broker: BrokerProcess) -> None:
    """The raw client publishes zeros under digests that are not theirs."""
    with RawClient(broker.runtime_directory, "publisher") as publisher:
        publication_id = publisher.publish().publication_id
        with RawClient(broker.runtime_directory, "receiver") as receiver:
            stream = receiver.acquire()
            failed = pb.ReportTransferRequest(transfer_id=next(stream).granted.transfer_id)
            failed.failed.cause = pb.TransferFailed.CAUSE_DIGEST_MISMATCH
            receiver.weight_broker.ReportTransfer(failed, metadata=receiver.metadata, timeout=60)
            quarantined = resources_pb2.Publication.STATE_QUARANTINED
            eventually(lambda: [one.state for one in broker.publications()] == [quarantined])
        (source,) = broker.publications()
        assert source.publication_id == publication_id
        assert "bias, embedding" in source.quarantine_reason
