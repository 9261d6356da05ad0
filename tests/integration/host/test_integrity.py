"""All or nothing: every byte in place and verified, or an exception that says what state the tensors are in."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support import actions
from support.broker_process import BrokerProcess
from support.instance_process import InstanceProcess
from support.waiting import eventually
from weight_broker import AcquireTimeout, IntegrityError, TransferFailed
from weight_broker.v1 import resources_pb2

Start = Callable[..., InstanceProcess]


def test_a_flipped_byte_raises_and_quarantines_the_source(broker: BrokerProcess, start_instance: Start) -> None:
    publisher, reader = start_instance("publisher"), start_instance("reader")
    publisher.call(actions.flip_before_sealing)
    publication_id = publisher.call(actions.publish, "model", 1)
    reader.call(actions.prepare)
    with pytest.raises(IntegrityError) as failed:
        reader.call(actions.acquire, "model")
    assert failed.value.touched
    assert failed.value.quiesced
    eventually(lambda: broker.publications()[0].state == resources_pb2.Publication.STATE_QUARANTINED)
    (source,) = broker.publications()
    assert source.publication_id == publication_id
    assert "layers." in source.quarantine_reason, "the reason names the tensor"
    assert broker.transfers()[0].state == resources_pb2.Transfer.STATE_FAILED


def test_after_wrong_bytes_the_next_source_serves(broker: BrokerProcess, start_instance: Start) -> None:
    bad, good, reader = (start_instance(name) for name in ("bad", "good", "reader"))
    bad.call(actions.flip_before_sealing)
    bad.call(actions.publish, "model", 1)
    good.call(actions.publish, "model", 1)
    reader.call(actions.prepare)
    report = reader.call(actions.acquire, "model")
    assert report.source_instance_name == "good"
    assert reader.call(actions.current) == actions.expected(1)


def test_after_wrong_bytes_an_instance_that_may_load_is_told_to(broker: BrokerProcess, start_instance: Start) -> None:
    bad, reader, next_reader = (start_instance(name) for name in ("bad", "reader", "next"))
    bad.call(actions.flip_before_sealing)
    bad.call(actions.publish, "model", 1)
    for instance in (reader, next_reader):
        instance.call(actions.prepare)
    assert reader.call(actions.acquire_or_load, "model", 1) == ("disk", actions.expected(1), 1)
    assert next_reader.call(actions.acquire_or_load, "model", 1) == ("peer", actions.expected(1), 0)


def test_a_failure_in_the_middle_says_that_the_tensors_were_touched(
    broker: BrokerProcess, start_instance: Start
) -> None:
    publisher, reader = start_instance("publisher"), start_instance("reader")
    publisher.call(actions.publish, "model", 1, count=16)
    reader.call(actions.prepare, count=16)
    reader.call(actions.fail_copies_after, 5)
    with pytest.raises(TransferFailed) as failed:
        reader.call(actions.acquire, "model")
    assert failed.value.touched
    assert failed.value.quiesced
    assert reader.call(actions.current) not in (actions.expected(1, count=16), actions.expected(0, count=16))
    (source,) = broker.publications()
    assert source.state == resources_pb2.Publication.STATE_RESIDENT, "the receiver's own failure is not the source's"
    assert source.reader_count == 0


def test_a_deadline_in_the_middle_says_that_the_tensors_were_touched(
    broker: BrokerProcess, start_instance: Start
) -> None:
    publisher, reader = start_instance("publisher"), start_instance("reader")
    publisher.call(actions.publish, "model", 1, count=16)
    reader.call(actions.prepare, count=16)
    reader.call(actions.slow_copies, 2.0)
    with pytest.raises(AcquireTimeout) as failed:
        reader.call(actions.acquire, "model", timeout=3.0)
    assert failed.value.touched
    assert failed.value.quiesced
    before = reader.call(actions.current)
    reader.call(actions.sleep, 0.5)
    assert reader.call(actions.current) == before, "somebody still wrote after the exception"


def test_a_deadline_while_waiting_leaves_the_tensors_alone(broker: BrokerProcess, start_instance: Start) -> None:
    loader, waiter = start_instance("loader"), start_instance("waiter")
    loader.call(actions.prepare)
    loader.call(actions.take_lease, "model")
    waiter.call(actions.prepare, seed=5)
    with pytest.raises(AcquireTimeout) as failed:
        waiter.call(actions.acquire, "model", timeout=0.5)
    assert not failed.value.touched
    assert waiter.call(actions.current) == actions.expected(5)


def test_zero_copy_tensors_are_right_and_private(broker: BrokerProcess, start_instance: Start) -> None:
    publisher, one, other = (start_instance(name) for name in ("publisher", "one", "other"))
    publisher.call(actions.publish, "model", 1)
    report = one.call(actions.attach_tensors, "model")
    assert report.path == "zero_copy"
    other.call(actions.attach_tensors, "model")
    one.call(actions.write_attached)
    assert one.call(actions.current_attached) != actions.expected(1)
    assert other.call(actions.current_attached) == actions.expected(1)
    publisher.kill()
    assert other.call(actions.current_attached) == actions.expected(1), "the memory outlives its publisher"


def test_a_zero_copy_of_wrong_bytes_is_refused(broker: BrokerProcess, start_instance: Start) -> None:
    publisher, reader = start_instance("publisher"), start_instance("reader")
    publisher.call(actions.flip_before_sealing)
    publisher.call(actions.publish, "model", 1, count=1, size_bytes=16384)
    with pytest.raises(IntegrityError):
        reader.call(actions.attach_tensors, "model")
