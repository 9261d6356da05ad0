"""Inspection's Watch: the full state first, then what changes, for readers quick and slow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from support import actions
from support.broker_process import BrokerProcess
from support.instance_process import InstanceProcess
from support.raw_client import RawClient, publish_request
from support.rpc_errors import assert_no_defect
from weight_broker.v1 import inspection_service_pb2 as inspection
from weight_broker.v1 import resources_pb2
from weight_broker.v1 import weight_broker_service_pb2 as pb
from weight_broker.v1.inspection_service_pb2_grpc import InspectionServiceStub

NO_WINDOW = [("grpc.http2.lookahead_bytes", 0), ("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
"""A channel that takes next to nothing in before it is read."""
PARTS_OF = 500
"""Changes in one message."""


class View:
    """What a reader knows who does as the proto says."""

    def __init__(self, broker: BrokerProcess, channel: grpc.Channel | None = None) -> None:
        stub = InspectionServiceStub(channel or broker.channel)
        self.stream: Any = stub.Watch(inspection.WatchRequest(), timeout=60)
        self.weight_sets: dict[str, resources_pb2.WeightSet] = {}
        self.instances: dict[str, resources_pb2.Instance] = {}
        self.transfers: dict[str, resources_pb2.Transfer] = {}
        self.messages: list[inspection.WatchResponse] = []

    def read(self) -> View:
        """Takes one message in."""
        message = next(self.stream)
        self.messages.append(message)
        if message.snapshot_start:
            assert message.snapshot
            self.weight_sets, self.instances, self.transfers = {}, {}, {}
        for change in message.changes:
            match change.WhichOneof("change"):
                case "weight_set":
                    self.weight_sets[change.weight_set.weight_set_id] = change.weight_set
                case "removed_weight_set_id":
                    self.weight_sets.pop(change.removed_weight_set_id, None)
                case "instance":
                    self.instances[change.instance.instance_id] = change.instance
                case "removed_instance_id":
                    self.instances.pop(change.removed_instance_id, None)
                case "transfer":
                    self.transfers[change.transfer.transfer_id] = change.transfer
        return self

    def until(self, condition: Callable[[View], object]) -> View:
        """Reads until `condition` holds; the call's own deadline bounds it."""
        while not condition(self):
            self.read()
        return self

    def models(self) -> set[str]:
        return {one.key.model for one in self.weight_sets.values()}

    def states(self) -> set[int]:
        return {one.state for one in self.transfers.values()}


def test_a_broker_with_nothing_says_so_in_one_message(broker: BrokerProcess) -> None:
    view = View(broker).read()
    [first] = view.messages
    assert (first.snapshot, first.snapshot_start, first.snapshot_end) == (True, True, True)
    assert not first.changes


def test_the_full_state_comes_first(broker: BrokerProcess) -> None:
    with RawClient(broker.runtime_directory, "source") as source, RawClient(broker.runtime_directory) as receiver:
        source.publish("resident")
        absent = receiver.acquire("absent", if_absent=pb.IF_ABSENT_LOAD)
        assert next(absent).HasField("cold_load")
        acquire = receiver.acquire("resident")
        transfer_id = next(acquire).granted.transfer_id
        view = View(broker).read()
        assert view.messages[0].snapshot_end
        assert view.models() == {"resident", "absent"}
        assert set(view.instances) == {source.instance_id, receiver.instance_id}
        assert set(view.transfers) == {transfer_id}
        [loading] = [one for one in view.weight_sets.values() if one.key.model == "absent"]
        assert loading.cold_load_lease.instance_id == receiver.instance_id
        acquire.cancel()


def test_every_step_of_a_transfer_is_told(broker: BrokerProcess) -> None:
    view = View(broker).read()
    with RawClient(broker.runtime_directory, "source") as source, RawClient(broker.runtime_directory) as receiver:
        view.until(lambda view: len(view.instances) == 2)
        publication = source.publish()
        view.until(lambda view: view.models() == {"model"})
        acquire = receiver.acquire()
        transfer_id = next(acquire).granted.transfer_id
        view.until(lambda view: view.states() == {resources_pb2.Transfer.STATE_RUNNING})
        view.until(lambda view: [one.publications[0].reader_count for one in view.weight_sets.values()] == [1])
        receiver.report_success(transfer_id)
        view.until(lambda view: view.states() == {resources_pb2.Transfer.STATE_SUCCEEDED})
        view.until(lambda view: [one.publications[0].served_count for one in view.weight_sets.values()] == [1])
        request = pb.RetractRequest(publication_id=publication.publication_id)
        source.weight_broker.Retract(request, metadata=source.metadata, timeout=60)
        view.until(lambda view: not view.weight_sets)
    view.until(lambda view: not view.instances)
    assert not any(message.snapshot for message in view.messages[1:])
    assert_no_defect(broker.log)


def test_a_killed_instance_and_what_it_held_are_told_as_removed(
    broker: BrokerProcess, start_instance: Callable[..., InstanceProcess]
) -> None:
    instance = start_instance("publisher")
    instance.call(actions.publish, "model", 1)
    view = View(broker).read()
    assert [one.pid for one in view.instances.values()] == [instance.pid]
    assert view.models() == {"model"}
    instance.kill()
    view.until(lambda view: not view.instances and not view.weight_sets)


def publish_many(source: RawClient, count: int) -> list[str]:
    """Publishes models 0 to `count` in one region; returns the publications' ids."""
    source.offer_region("region")
    calls = [
        source.weight_broker.Publish.future(
            publish_request(f"{number}", request_id=f"{number}"), metadata=source.metadata, timeout=60
        )
        for number in range(count)
    ]
    return [call.result().publication.publication_id for call in calls]


def test_a_large_state_comes_in_parts_of_which_the_first_and_the_last_are_marked(broker: BrokerProcess) -> None:
    with RawClient(broker.runtime_directory, "source") as source:
        publish_many(source, 2 * PARTS_OF + 1)
        view = View(broker).until(lambda view: view.messages and view.messages[-1].snapshot_end)
        assert [message.snapshot_start for message in view.messages] == [True, False, False]
        assert [message.snapshot_end for message in view.messages] == [False, False, True]
        assert all(message.snapshot for message in view.messages)
        assert len(view.models()) == 2 * PARTS_OF + 1


def test_a_reader_that_sleeps_misses_nothing_and_holds_up_nobody(broker: BrokerProcess) -> None:
    """It gets fewer, larger messages: what changed many times meanwhile is told once."""
    with (
        grpc.insecure_channel(f"unix:{broker.socket_path}", options=NO_WINDOW) as channel,
        RawClient(broker.runtime_directory, "source") as source,
    ):
        sleeper, quick = View(broker, channel).read(), View(broker).read()
        rounds, count = 5, 200
        for _ in range(rounds):
            for publication_id in publish_many(source, count):
                request = pb.RetractRequest(publication_id=publication_id)
                source.weight_broker.Retract(request, metadata=source.metadata, timeout=60)
        source.publish("last")
        quick.until(lambda view: view.models() == {"last"})
        assert broker.host().publication_count == 1, "it answers, whoever sleeps"
        sleeper.until(lambda view: view.models() == {"last"})
        assert set(sleeper.instances) == {source.instance_id}
        told = sum(len(message.changes) for message in sleeper.messages)
        assert told < 2 * count, "each weight set once or so, not ten times"
    assert_no_defect(broker.log)
